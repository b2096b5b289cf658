"""Everything is in pyproject.toml but this: a wheel that holds packs is for one platform, and for any Python 3."""

import json
import shutil
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

PACKS = Path(__file__).absolute().parent / "tvm_flash" / "packs"


class DistributionOfPacks(Distribution):
    """Compiled code is in the packs, if anywhere, and not in extension modules."""

    def has_ext_modules(self):
        return any(PACKS.rglob("*.so"))


class FilesOfPacks(build_py):
    """Leaves out modules that a pack's manifest doesn't name: those of its last build, kept for processes that run."""

    def run(self):
        shutil.rmtree(self.build_lib, ignore_errors=True)  # what an earlier build left there would be packed too
        super().run()

    def find_data_files(self, package, src_dir):
        named = set()
        for path in PACKS.glob("*/manifest.json"):
            manifest = json.loads(path.read_text())
            named |= {path.parent / file["file"] for file in (*manifest["modules"], *manifest["support_files"])}
        files = (Path(file) for file in super().find_data_files(package, src_dir))
        return [str(file) for file in files if file.suffix != ".so" or file.absolute() in named]


class WheelOfPacks(bdist_wheel):
    """Tags the wheel ``py3-none-<platform>`` if there is compiled code in it, else ``py3-none-any``."""

    def get_tag(self):
        _, _, platform = super().get_tag()
        return "py3", "none", platform


setup(distclass=DistributionOfPacks, cmdclass={"bdist_wheel": WheelOfPacks, "build_py": FilesOfPacks})
