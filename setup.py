"""Everything is in pyproject.toml but this: a wheel that holds packs is for one platform, and for any Python 3."""

from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel

PACKS = Path(__file__).parent / "tvm_flash" / "packs"


class WheelOfPacks(bdist_wheel):
    """Tags the wheel ``py3-none-<platform>`` if there is compiled code in it, else ``py3-none-any``."""

    def finalize_options(self):
        super().finalize_options()
        self.root_is_pure = not any(PACKS.rglob("*.so"))

    def get_tag(self):
        _, _, platform = super().get_tag()
        return "py3", "none", platform


setup(cmdclass={"bdist_wheel": WheelOfPacks})
