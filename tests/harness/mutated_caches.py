"""Caches and settings that were changed at random; nothing but time may be lost by it."""

from __future__ import annotations

import hashlib
import json
import math
import random
from pathlib import Path

import torch
from hswq.loader.files import fingerprints, kept_json, owners
from hswq.loader.files.whole_hash import background
from hswq.loader.host.settings import Settings, SettingsFile
from hswq.loader.jobs.keeping import above_noise
from hswq.loader.store import effects, heads, heads_file, refined, search_cache
from hswq.quant import LARGEST_EFFECT, make_plan

from harness import mutations
from harness.modelfiles import model_file
from harness.mutations import LAYERS, Attack, made_up, mutated
from harness.refined import KEY, MODEL, keep
from harness.sketches import record


def plans(folder: Path, numbers: random.Random) -> Attack:
    """Mutate what was found by searching."""
    weights = {f"layer{n}": torch.ones(4, 4) * (n + 1) for n in range(LAYERS)}
    key = "0" * 40
    search_cache.keep_findings(key, make_plan(weights, made_up(), 0.25, scaled=True), 1)
    path = search_cache._path(key)
    good = path.read_bytes()
    known = search_cache.find_findings(key)
    assert known is not None

    def is_believed(_: Path) -> bool:
        found = search_cache.find_findings(key)
        assert found in (None, known)
        return found is not None

    return Attack(path, lambda: mutated(good, numbers), is_believed)


def sealed(good: bytes, numbers: random.Random) -> bytes:
    """Mutate the text of a file that begins with its checksum; mostly the checksum is right."""
    if numbers.random() < 0.2:
        return mutated(good, numbers)
    text = mutated(good.partition(b"\n")[2], numbers)
    return hashlib.sha256(text).hexdigest().encode() + b"\n" + text


def sealed_plans(folder: Path, numbers: random.Random) -> Attack:
    """Mutate what was found by searching, under right checksums."""
    attack = plans(folder, numbers)
    good = attack.path.read_bytes()

    def is_believed(path: Path) -> bool:
        found = search_cache.find_findings(path.stem)
        return found is not None and bool(json.dumps(found.to_json()))

    return Attack(attack.path, lambda: sealed(good, numbers), is_believed)


def measured_effects(folder: Path, numbers: random.Random) -> Attack:
    """Mutate measured effects, mostly under right checksums."""
    layers = {f"layer{n}": 0.5**n for n in range(LAYERS)}
    effects.keep_effects(MODEL, "scaled", effects.Effects(layers, "a way", whole=True))
    path = effects._path(MODEL, "scaled", whole=True)
    good = path.read_bytes()

    def is_believed(_: Path) -> bool:
        found = effects.find_effects(MODEL, "scaled")
        assert list(effects.measured_in(MODEL)) == ["scaled"]
        if found is None:
            return False
        assert found.whole
        assert all(0 <= effect <= LARGEST_EFFECT for effect in found.layers.values())
        return math.isfinite(math.fsum(above_noise(found.layers).values()))

    return Attack(path, lambda: sealed(good, numbers), is_believed)


def refined_models(folder: Path, numbers: random.Random) -> Attack:
    """Mutate a quantized model on disk."""
    scale = torch.tensor(0.5)
    layers = {
        f"layer{n}": (torch.full((8, 8), n + 1.0).to(torch.float8_e4m3fn), scale)
        for n in range(LAYERS)
    }
    path = keep(layers)
    good = path.read_bytes()

    def is_believed(_: Path) -> bool:
        found = refined.find(KEY)
        if found is None:
            return False
        read = {name: found.read(name, lambda tensor: tensor) for name in found.names}
        for name in read.keys() - {name for name, layer in read.items() if layer is None}:
            data, scale = read[name]
            assert data.view(torch.uint8).equal(layers[name][0].view(torch.uint8))
            assert scale.equal(layers[name][1])
        return True

    return Attack(path, lambda: mutated(good, numbers), is_believed)


def kept_heads(folder: Path, numbers: random.Random) -> Attack:
    """Mutate what is kept of a model's statistics files."""
    record(1)
    heads._known.clear()
    known = heads.heads_of(MODEL[:16], keep=True)
    path = heads._path(MODEL[:16])
    good = path.read_bytes()

    def is_believed(path: Path) -> bool:
        heads._known.clear()
        believed = heads_file.read(path)
        assert heads.heads_of(MODEL[:16]).models[0].total.samples == known.models[0].total.samples
        return believed is not None

    return Attack(path, lambda: mutated(good, numbers), is_believed)


def kept_fingerprints(folder: Path, numbers: random.Random) -> Attack:
    """Mutate the kept fingerprints of model files, which have no checksum."""
    source = model_file(folder / "source" / "a.safetensors")
    fingerprints.fingerprint(source)
    path = fingerprints._file()
    good = path.read_bytes()

    def is_believed(_: Path) -> bool:
        fingerprints._all.cache_clear()
        found = fingerprints.known(source)
        assert found in (None, fingerprints.DAMAGED) or len(found) == 64
        return bool(fingerprints._kept(path))

    return Attack(path, lambda: mutated(good, numbers), is_believed)


def kept_owners(folder: Path, numbers: random.Random) -> Attack:
    """Mutate what is kept of whose weights a fingerprint is, under right checksums."""
    source = model_file(folder / "source" / "b.safetensors", seed=1)
    its = fingerprints.fingerprint(source)
    background.join()
    path = owners._file()
    kept_json.write(path, kept_json.read(path))
    good = path.read_bytes()

    def is_believed(path: Path) -> bool:
        assert len(fingerprints.looked_up(source)) == 64
        owners.agrees(its, "x")
        return owners._now() != owners._NOTHING

    return Attack(path, lambda: sealed(good, numbers), is_believed)


def settings(folder: Path, numbers: random.Random) -> Attack:
    """Mutate ComfyUI's settings."""
    text = (
        b'{"HSWQ.Target": 64, "HSWQ.Budget": 2.5, "HSWQ.Record": true, "HSWQ.RefinedGB": 7.5, '
        b'"HSWQ.Names": "a.example, b", "Comfy.Other": [1, {"x": null}]}'
    )

    def is_believed(path: Path) -> bool:
        found = SettingsFile(path).current()
        assert 32 <= found.target <= 4096
        assert 0 < found.budget <= 100
        assert 0 <= found.refined_gb <= 4096
        return found != Settings()

    return Attack(folder / "comfy.settings.json", lambda: mutated(text, numbers), is_believed)


KINDS = {
    "statistics": mutations.statistics, "pickles": mutations.pickles,
    "sketches": mutations.sketches, "headers": mutations.headers, "plans": plans,
    "sealed plans": sealed_plans, "effects": measured_effects, "heads": kept_heads,
    "refined models": refined_models,
    "fingerprints": kept_fingerprints, "owners": kept_owners, "settings": settings,
    "INT8 layers": mutations.int8_layers,
}  # fmt: skip
"""What makes the attacks, by what is changed."""
