"""Runs `secure-comms-adaptor serve` with a KBS that takes everything, and schemathesis against its API.

Usage: fuzz.py SECURE-COMMS-ADAPTOR SCHEMATHESIS SEED EXAMPLES, in a network namespace of its own (tests/api-fuzz).
"""

import http.server
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import threading
import time

HERE = pathlib.Path(__file__).parent
# Time for the whole, in seconds.
PATIENCE = 300


class Kbs(http.server.BaseHTTPRequestHandler):
    """A KBS that takes everything."""

    def answer(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = do_DELETE = answer

    def log_message(self, *_):
        pass


def bridge(path):
    """Serves the unix socket on a TCP port, which schemathesis needs. Returns the port."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)

    def copy(source, sink):
        try:
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            # One side is gone: so is the other.
            for end in (source, sink):
                end.close()

    def accept():
        while True:
            client, _ = listener.accept()
            service = socket.socket(socket.AF_UNIX)
            service.connect(path)
            for ends in ((client, service), (service, client)):
                threading.Thread(target=copy, args=ends, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return listener.getsockname()[1]


def wait_for(path, service):
    """Returns once the API listens."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if service.poll() is not None:
            sys.exit(f"api-fuzz: serve ended with {service.returncode}")
        probe = socket.socket(socket.AF_UNIX)
        try:
            probe.connect(path)
            return
        except OSError:
            time.sleep(0.1)
        finally:
            probe.close()
    sys.exit("api-fuzz: the API does not listen within 60 s")


def main(adaptor, schemathesis, seed, examples):
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    kbs = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Kbs)
    threading.Thread(target=kbs.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory(prefix="sc-") as directory:
        path = f"{directory}/adaptor.sock"
        # Nothing of the caller's environment is a setting.
        clean = {name: value for name, value in os.environ.items() if not name.startswith("SECURE_COMMS")}
        log = open(f"{directory}/log", "w+")
        arguments = ["--caa", "off", "--metrics-listen", "", "--store", f"{directory}/store", "--run-dir", directory,
                     "--socket", path, "--kbs", "127.0.0.1:9", "--kbs-url", f"http://127.0.0.1:{kbs.server_port}"]
        service = subprocess.Popen([adaptor, "serve", *arguments], stdout=log, stderr=log, env=clean)
        try:
            wait_for(path, service)
            url = f"http://127.0.0.1:{bridge(path)}"
            environment = clean | {"SCHEMATHESIS_HOOKS": "hooks", "PYTHONPATH": str(HERE.resolve())}
            # It runs in another directory: a relative name would not be found there.
            command = [os.path.abspath(schemathesis), "--config-file", str((HERE / "schemathesis.toml").resolve()), "run",
                       f"{url}/openapi.json", "--url", url, "--seed", seed, "--max-examples", examples,
                       "--generation-database", "none", "--workers", "2",
                       "--request-timeout", "20", "--no-color", "--warnings", "off",
                       # It never ends. node/tests/api.rs tests it.
                       "--exclude-path", "/v1/events"]
            tested = subprocess.run(command, cwd=directory, env=environment, timeout=PATIENCE)
            if service.poll() is not None:
                sys.exit(f"api-fuzz: serve ended with {service.returncode}:\n{open(log.name).read()[-4000:]}")
            service.terminate()
            ended = service.wait(timeout=60)
            text = open(log.name).read()
            if tested.returncode != 0 or ended != 0 or "panicked" in text:
                sys.exit(f"api-fuzz: schemathesis {tested.returncode}, serve {ended}; the end of its log:\n{text[-4000:]}")
        finally:
            if service.poll() is None:
                service.kill()
                service.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
