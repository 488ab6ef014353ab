"""A real Chromium without a window, driven over its DevTools pipe; nothing but the standard library."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --remote-debugging-pipe --hide-scrollbars"

# The browser reads its file 3 and writes its file 4; they are copied above 10 first, since either may be the other's number.
START = """import fcntl, os, sys
pipes = [fcntl.fcntl(int(number), fcntl.F_DUPFD_CLOEXEC, 10) for number in sys.argv[1:3]]
os.dup2(pipes[0], 3), os.dup2(pipes[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Page:
    """One tab. `events` are all that the browser has said so far."""

    def __init__(self, pipe_in, pipe_out):
        self.write, self.read, self.events, self.number, self.session = pipe_in, pipe_out, [], 0, {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters, **self.session}
        self.write.write(json.dumps(message).encode() + b"\0")
        self.write.flush()
        while (answer := self.next()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def next(self):
        text = bytearray()
        while (byte := self.read.read(1)) != b"\0":
            assert byte, "the browser has ended"
            text += byte
        return json.loads(text)

    def open(self, url, width=1200, dark=False):
        """Loads the page anew in a window of `width` pixels."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.call("Page.navigate", url=url)
        while not self.said("Page.loadEventFired"):
            self.events.append(self.next())

    def said(self, method):
        return [event["params"] for event in self.events if event.get("method") == method]

    def ask(self, expression):
        """The value of a JavaScript expression, awaited."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self, path=None):
        """The whole page as PNG."""
        data = base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"])
        if path is not None:
            path.write_bytes(data)
        return data


@contextlib.contextmanager
def chromium(folder):
    """A `Page` of a browser that resolves no host name; `folder` is for its profile."""
    (child_in, write), (read, child_out) = os.pipe(), os.pipe()
    flags = [*FLAGS.split(), "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder}", "about:blank"]
    command = [sys.executable, "-c", START, str(child_in), str(child_out), str(CHROMIUM), *flags]
    process = subprocess.Popen(command, pass_fds=(child_in, child_out), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    os.close(child_in)
    os.close(child_out)
    watchdog = threading.Timer(120, process.kill)  # a browser that hangs ends the pipe, and with it the test
    watchdog.start()
    try:
        with os.fdopen(write, "wb") as pipe_in, os.fdopen(read, "rb") as pipe_out:
            yield Page(pipe_in, pipe_out)
    finally:
        watchdog.cancel()
        process.terminate()
        process.wait(20)
