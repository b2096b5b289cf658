"""From a fresh clone to attention on this machine: install, build its pack, run it beside PyTorch on real input."""

from environment import prepare, run

if __name__ == "__main__":
    python = prepare()
    run([python, "-m", "tvm_flash", "demo"])
