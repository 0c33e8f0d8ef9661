"""`make demo`: start the built repository on free ports, ask about a photo, stop."""

import shlex
import signal
import subprocess
import sys
from pathlib import Path

BIN = Path(sys.executable).parent
PHOTO = "photos/coffee.jpg"
COMMANDS = [f"classify {PHOTO} --top-k 5", f"embed {PHOTO}", f"features {PHOTO}"]


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped too
    ports = ["--grpc-port", "0", "--http-port", "0", "--metrics-port", "0"]
    command = [BIN / "vit-server", "--model-repository", "models", *ports]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            url = wait_until_ready(server)
            for words in COMMANDS if url else []:
                print(f"\n$ vit-client {words}", flush=True)
                subprocess.run([BIN / "vit-client", *shlex.split(words), "--url", url], check=True)
        except subprocess.CalledProcessError as e:
            return e.returncode
        except KeyboardInterrupt:
            return 130
        finally:
            server.terminate()
            server.wait()
    if server.returncode == 0:
        print("\nThe server has stopped. `make serve` keeps one running.")
    return server.returncode


def wait_until_ready(server: subprocess.Popen[str]) -> str:
    """Show what the server says until it is ready; its gRPC address, or "" where it failed."""
    url = ""
    for line in server.stdout or ():
        print(line, end="", flush=True)
        if line.startswith("gRPC"):
            url = line.split()[1]
        if line.startswith("Ready"):
            return url
    return ""


if __name__ == "__main__":
    sys.exit(main())
