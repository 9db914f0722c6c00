#!/usr/bin/python3
"""Checkpoints as other programs see them: h5py shows each tensor whole through index.h5.

    ckpt_h5py.py COMMAND…

COMMAND is `… test_ckpt write`, started with a folder's name added: it saves steps 1 and 2 there, with the values of
fixture_value in tests/mpi/ckpt_fixture.c.
"""
import json
import pathlib
import subprocess
import sys
import tempfile

import h5py
import numpy as np

TENSORS = [
    ("model.embed_tokens.weight", (37, 13)),
    ("model.layers.0.mlp.up_proj.weight", (5, 64)),
    ("model.norm.weight", (29,)),
    ("column", (17, 1)),
    ("row", (1, 19)),
    ("single", (1,)),
    ("optim/exp_avg/model.embed_tokens.weight", (37, 13)),
]


def expected(t, shape, step):
    return (t * 1024 + np.arange(np.prod(shape)) + step / 64).astype(np.float32).reshape(shape)


def digest(values):
    """As train/ckpt/digest.c defines it, which every rank computes of its own part only."""
    with np.errstate(over="ignore"):
        places = np.arange(values.size, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        h = places + values.ravel().view(np.uint32).astype(np.uint64)
        h = (h ^ (h >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
        return int(np.sum(h ^ (h >> np.uint64(32)), dtype=np.uint64))


def datasets(h5):
    names = []
    h5.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    return sorted(names)


def check(folder, step):
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["meta"]["step"] == step
    assert sorted(f["name"] for f in manifest["files"]) == sorted(p.name for p in folder.glob("*.h5"))
    assert [(t["name"], tuple(t["shape"])) for t in manifest["tensors"]] == TENSORS
    for t, (name, shape) in enumerate(TENSORS):
        assert int(manifest["tensors"][t]["digest"], 16) == digest(expected(t, shape, step)), name
    with h5py.File(folder / "index.h5", "r") as h5:
        assert datasets(h5) == sorted(name for name, _ in TENSORS)
        for t, (name, shape) in enumerate(TENSORS):
            assert h5[name].shape == shape and h5[name].dtype == np.float32, name
            assert np.array_equal(h5[name][...], expected(t, shape, step)), f"{folder}: {name}"


def check_hole(folder):
    """What a missing file held is NaN, never zeros; the rest stays."""
    (folder / "rank-00001.h5").unlink()
    with h5py.File(folder / "index.h5", "r") as h5:
        values = h5[TENSORS[0][0]][...]
    right = expected(0, TENSORS[0][1], 1)
    assert np.isnan(values).any()
    assert ((values == right) | np.isnan(values)).all()


def main():
    with tempfile.TemporaryDirectory(prefix="tatara-h5py-") as name:
        run = pathlib.Path(name, "run")
        subprocess.run([*sys.argv[1:], str(run)], check=True, timeout=60)
        check(run / "step-00000001", 1)
        check(run / "step-00000002", 2)
        moved = (run / "step-00000001").rename(pathlib.Path(name, "moved"))
        check(moved, 1)
        check_hole(moved)
    print("h5py sees every tensor whole")


if __name__ == "__main__":
    main()
