import gzip
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.study import __main__ as study
from benchmarks.study.archive import Archive
from dblocks.recipes.records import read_record, write_record

ROOT = Path(__file__).resolve().parents[3]


def record(value):
    return {"format": 1, "value": value}


@pytest.fixture
def archive(tmp_path):
    return Archive(tmp_path / "study")


def add(archive, name, value):
    write_record(archive.folder / f"{name}.json", record(value))


def test_records_are_the_same_in_files_packed_and_unpacked(archive):
    for name, value in (("b", 2), ("a", 1)):
        add(archive, name, value)
    before = archive.load()
    assert before == {"a": record(1), "b": record(2)}
    archive.pack()
    assert archive.load() == before
    assert not any(archive.folder.iterdir())
    archive.unpack()
    assert archive.load() == before
    assert read_record(archive.folder / "a.json") == record(1)
    assert not archive.file.exists()


def test_bytes_depend_on_the_records_only(archive, tmp_path):
    other = Archive(tmp_path / "other")
    for name in "abc":
        add(archive, name, name)
    archive.pack()
    for name in "cab":
        add(other, name, name)
        other.pack()
    assert other.file.read_bytes() == archive.file.read_bytes()
    lines = gzip.decompress(archive.file.read_bytes()).decode().splitlines()
    assert [json.loads(line)["name"] for line in lines] == ["a", "b", "c"]


def test_a_file_counts_before_a_packed_record_and_replaces_it(archive):
    add(archive, "a", 1)
    archive.pack()
    add(archive, "a", 2)
    assert archive.load() == {"a": record(2)}
    archive.pack()
    assert archive.load() == {"a": record(2)}


def test_what_is_no_record_stays_where_it_is(archive):
    add(archive, "a", 1)
    (archive.folder / "a.json.17.part").write_text("{")  # a run that writes its record
    archive.pack()
    assert [path.name for path in archive.folder.iterdir()] == ["a.json.17.part"]


def test_nothing_is_an_empty_archive(archive):
    assert archive.load() == {}
    archive.pack()
    assert archive.load() == {}


@pytest.mark.parametrize("text", ["{", "[]", "[1]"])
@pytest.mark.parametrize("packed", [True, False])
def test_a_broken_archive_is_a_clear_error(archive, text, packed):
    archive.file.parent.mkdir(parents=True, exist_ok=True)
    archive.file.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    with pytest.raises(ValueError, match=r"study\.jsonl\.gz is not an archive of records"):
        archive.load()


def add_and_pack(folder, names):
    for name in names:
        write_record(folder / f"{name}.json", record(name))
        Archive(folder).pack()


def test_those_that_pack_at_once_lose_nothing(archive):
    # Each opens the folder that it locks for itself, in threads as in processes.
    names = [[f"{i}-{k}" for k in range(15)] for i in range(3)]
    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(add_and_pack, [archive.folder] * len(names), names))
    assert archive.load() == {name: record(name) for many in names for name in many}


@pytest.mark.parametrize("name", ["vit-digits", "dit-fashion-ablations"])
def test_the_command_packs_and_unpacks_what_it_is_told(archive, monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    there = Archive({**study.EXPERIMENTS, **study.STUDIES}[name].records)
    add(there, "a", 1)
    other = Archive(study.EXPERIMENTS["dit-digits"].records)
    assert study.main(["pack", "dit-digits"]) == 0
    assert not other.file.exists()  # there is nothing to pack
    assert (there.folder / "a.json").exists()
    assert study.main(["pack", name]) == 0
    assert not (there.folder / "a.json").exists()
    assert study.main(["unpack", name]) == 0
    assert there.load() == {"a": record(1)}
    assert (there.folder / "a.json").exists()


@pytest.mark.parametrize("name", {**study.EXPERIMENTS, **study.STUDIES})
def test_the_records_that_are_there_are_of_runs_that_are_known(name):
    runs = (
        [run for _, run in study.EXPERIMENTS[name].rows.values()]
        if name in study.EXPERIMENTS
        else []
    )
    runs += [row.run for row in study.STUDIES[name].rows] if name in study.STUDIES else []
    kinds = {type(run) for run in runs}
    folder = ROOT / "benchmarks/results" / name.replace("-", "_")
    records = Archive(folder).load()
    for key, record in records.items():
        if key != "scores":
            made = record["run"]
            fields = {kind: {*kind.__dataclass_fields__} for kind in kinds}
            kind = min((k for k in kinds if {*made} <= fields[k]), key=lambda k: len(fields[k]))
            assert kind.from_dict(made).to_dict().keys() >= made.keys()


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "twice", "outside", "format"])
def test_an_archive_that_is_broken_is_named(tmp_path, damage):
    folder = tmp_path / "study"
    write_record(folder / "a.json", {"format": 1, "accuracy": 0.5})
    archive = Archive(folder)
    archive.pack()
    whole = archive.file.read_bytes()
    line = {"name": "a", "record": {"format": 1}}
    lines = {
        "twice": [line, line],
        "outside": [{**line, "name": "../a"}],
        "format": [{**line, "record": {"format": 0}}],
    }
    broken = {
        "empty": b"",
        "cut": whole[:-9],
        "flipped": whole[:12] + bytes([whole[12] ^ 255]) + whole[13:],
    }
    if damage in broken:
        archive.file.write_bytes(broken[damage])
    else:
        text = "".join(json.dumps(line) + "\n" for line in lines[damage])
        archive.file.write_bytes(gzip.compress(text.encode()))
    with pytest.raises(ValueError, match="is not an archive of records"):
        archive.load()
