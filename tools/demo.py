"""`make demo`: runs the full-size network on a photo, then a small one trained on digits."""

import shlex
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "examples"))
import digits  # noqa: E402

PHOTO = "photos/coffee.jpg"
COMMANDS = [f"classify {PHOTO} --top-k 5", f"embed {PHOTO}", f"features {PHOTO}"]


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped too
    try:
        with digits.serving(Path("models")) as address:
            for words in COMMANDS:
                print(f"\n$ vit-client {words}", flush=True)
                command = [digits.BIN / "vit-client", *shlex.split(words), "--url", address]
                subprocess.run(command, check=True)
        print("\nNow a small network that has learned something (examples/digits.py):", flush=True)
        digits.main()
    except subprocess.CalledProcessError as e:
        return e.returncode
    except KeyboardInterrupt:
        return 130
    print("\nThe server has stopped. `make serve` keeps one running, with the full-size network.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
