"""What can be written is told before a command begins, with what stands in the way."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tvm_flash.machine.outputs import fault_of_file, fault_of_folder


def test_what_is_in_the_way_is_named(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    assert fault_of_file(file) is None and fault_of_file(tmp_path / "new") is None
    assert fault_of_file(tmp_path) == f"{tmp_path} is a folder"
    assert fault_of_file(tmp_path / "no" / "new") == f"{tmp_path / 'no'} isn't there"
    assert fault_of_file(file / "new") == f"{file} is no folder"
    assert fault_of_folder(tmp_path) is None and fault_of_folder(tmp_path / "a" / "b") is None
    assert fault_of_folder(file) == fault_of_folder(file / "a" / "b") == f"{file} is no folder"


def test_rights_are_asked_for(tmp_path, monkeypatch):
    denied = tmp_path / "denied"
    denied.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: path != denied)  # a superuser may write everywhere
    says = f"{denied} can't be written"
    assert fault_of_file(denied / "new") == fault_of_folder(denied / "new") == fault_of_folder(denied) == says
    file = denied / "file"
    file.write_text("")
    assert fault_of_file(file) is None
    monkeypatch.setattr(os, "access", lambda path, mode: path != file)
    assert fault_of_file(file) == f"{file} can't be written"


@pytest.mark.parametrize("path", ("results.json", "./results.json"))
def test_a_name_alone_is_of_this_folder(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fault_of_file(Path(path)) is None
