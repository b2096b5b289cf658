"""What a kernel is made from: the files of its own family and of what all share, and no others."""

from schedules.builder import sources
from schedules.families import FAMILY


def names(*modules: str) -> set[str]:
    return {p.relative_to(sources.ROOT).as_posix() for p in sources.closure(*modules)}


def test_a_family_depends_on_what_it_imports_and_on_no_other_family():
    hopper = names("schedules.builder.compile", "schedules.families.sm90")
    shared = {"schedules/tile/softmax.py", "schedules/definition/catalogue.py"}
    assert {*shared, "schedules/families/sm90/consumer.py"} <= hopper
    assert not {n for n in hopper if "/cpu/" in n or "sm80" in n}
    assert "schedules/families/mma/mma.py" in names("schedules.families.mma.sm75")


def test_of_the_run_time_kernels_depend_on_tables_only():
    tables = {
        f"tvm_flash/{name}.py" for name in ("catalogue", "operators", "reference", "packs/manifest", "packs/sizes")
    }
    for family in set(FAMILY.values()):
        files = names("schedules.builder.compile", f"schedules.families.{family}")
        assert {n for n in files if n.startswith("tvm_flash")} == tables


def test_what_only_runs_a_build_decides_no_kernel():
    for family in set(FAMILY.values()):
        assert not names("schedules.builder.compile", f"schedules.families.{family}") & {
            "schedules/commands/build.py",
            "schedules/builder/plan.py",
            "schedules/builder/records.py",
        }


def test_digest_follows_contents(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    a = tmp_path / "a.py"
    a.write_text("x = 1")
    before = sources.digest([a])
    assert sources.digest([a]) == before
    a.write_text("x = 2")
    assert sources.digest([a]) != before
