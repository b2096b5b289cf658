"""``python -m schedules.commands``: the builder's command in a process of its own."""

import sys

from schedules.builder.workers import import_tvm

if __name__ == "__main__":  # worker processes import this file
    import_tvm()
    from schedules.commands.build import main

    sys.exit(main())
