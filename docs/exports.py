"""For the reference: a folder's exports win over its files, where a function has the name of a file."""

import griffe


class Exports(griffe.Extension):
    """Makes ``paradigms.meta.maml`` the function that the folder exports, as it is for Python, instead of the file."""

    def on_package(self, *, pkg, **kwargs):
        """Called by griffe once the package is read."""
        del kwargs
        found = [
            (folder, name, folder.members[name])
            for folder in pkg.modules.values()
            for name in map(str, folder.exports or ())
            if name in folder.members
        ]
        for _, _, member in found:
            if member.is_alias:
                member.resolve_target()  # while its file can still be found by name
        for folder, name, member in found:
            if member.is_module:
                files = [file for file in folder.modules.values() if name in file.members]
                defined = next((file[name] for file in files if not file[name].is_alias), None)
                if defined is not None:
                    folder.members[name] = griffe.Alias(name, defined, parent=folder)
