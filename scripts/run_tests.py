"""From a fresh clone to passed tests: install, build the native pack, run pytest with the arguments given."""

import sys

from environment import prepare, run

if __name__ == "__main__":
    python = prepare()
    run([python, "-m", "pytest", *sys.argv[1:]])
