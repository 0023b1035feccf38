"""`.pt` files: plain tensors are read; code is refused and never run; broken files are named."""

import os
import pickle

import pytest
import torch

from hf_msae.formats.common import Files, FormatError
from hf_msae.formats.safe_pickle import read_pt


class Touch:
    """Unpickling this runs a command that makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


def test_tensors_and_plain_values_are_read(tmp_path):
    content = {"W": torch.arange(6.0).view(2, 3), "step": 3, "optimizer": {"state": {0: torch.ones(2)}}}
    torch.save(content, tmp_path / "a.pt")
    content = read_pt(Files(tmp_path), "a.pt")
    assert content["step"] == 3
    assert content["W"].tolist() == [[0, 1, 2], [3, 4, 5]]


def save_bare(content, path):
    path.write_bytes(pickle.dumps(content, protocol=2))


def load_bare(path, weights_only):
    return pickle.loads(path.read_bytes())


@pytest.mark.parametrize(("save", "load"), [(torch.save, torch.load), (save_bare, load_bare)])
def test_code_is_refused_and_never_run(tmp_path, save, load):
    proof = tmp_path / "executed"
    save({"W": [1.0, 2.0], "extra": Touch(proof)}, tmp_path / "a.pt")
    with pytest.raises(FormatError, match=r"a\.pt of .* would run \S*system on being read, so it was not read"):
        read_pt(Files(tmp_path), "a.pt")
    assert not proof.exists()
    # The same file is what it claims to be: reading it without the restriction runs the command.
    load(tmp_path / "a.pt", weights_only=False)
    assert proof.exists()


def test_the_refusal_says_what_would_run_and_what_to_do(tmp_path):
    torch.save({"extra": Touch(tmp_path / "executed")}, tmp_path / "a.pt")
    with pytest.raises(FormatError, match=r"would run \S*system on being read, so it was not read\. Ask its author"):
        read_pt(Files(tmp_path), "a.pt")


@pytest.mark.parametrize("keep", [0, 1, 100, 2000])
def test_truncated_files_are_refused(tmp_path, keep):
    path = tmp_path / "a.pt"
    torch.save({"W": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FormatError, match=f"a.pt .*{keep:,} bytes.*no whole PyTorch file.*fetch it again"):
        read_pt(Files(tmp_path), "a.pt")


def test_something_else_is_refused(tmp_path):
    (tmp_path / "a.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    with pytest.raises(FormatError, match="no whole PyTorch file"):
        read_pt(Files(tmp_path), "a.pt")
    torch.save(torch.ones(3), tmp_path / "b.pt")
    with pytest.raises(FormatError, match="should hold a dictionary of tensors, but holds a Tensor"):
        read_pt(Files(tmp_path), "b.pt")
