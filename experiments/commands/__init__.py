"""What the command line does besides running an experiment: one file a command.

A command's file has a docstring (its first line is the summary in the help), a frozen dataclass ``Flags`` and
``main(flags, root) -> exit code``. It raises ValueError or OSError for what the user can mend, which the command line
shows in one line. Nothing heavy is imported before ``main`` runs.
"""
