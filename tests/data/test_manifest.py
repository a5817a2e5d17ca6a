"""Manifests of each form, and each reason to refuse one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slap_fast.data.manifest import ManifestError, read_manifest


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def jsonl(folder: Path, *rows) -> Path:
    return write(folder / "m.jsonl", "\n".join(json.dumps(row) for row in rows) + "\n")


def test_jsonl(tmp_path):
    full = {"path": "b/x.wav", "caption": ["one", " two "], "label": "dog", "split": "train"}
    full |= {"start": 1, "end": 2.5, "duration_s": 9.0, "other": {"kept": False}}
    first, second = read_manifest(jsonl(tmp_path, full, {"path": "/y.wav", "caption": "three"}))
    assert first.path == tmp_path / "b" / "x.wav" and first.captions == ("one", "two")
    assert (first.label, first.split, first.start, first.end) == ("dog", "train", 1.0, 2.5)
    assert (first.seconds, first.line) == (9.0, 1)
    assert second.path == Path("/y.wav") and second.captions == ("three",)
    assert (second.label, second.split, second.start, second.end) == (None, None, 0.0, None)
    assert (second.seconds, second.line) == (None, 2)


def test_csv_with_quotes_blank_lines_and_empty_fields(tmp_path):
    text = 'caption,path,split,start,end,duration_s,label\n"a ""b"",\nc",x.wav,val,0.5,,3,7\n\n'
    (row,) = read_manifest(write(tmp_path / "m.csv", text))
    assert row.captions == ('a "b",\nc',) and row.path == tmp_path / "x.wav"
    assert (row.split, row.start, row.end, row.seconds) == ("val", 0.5, None, 3.0)
    assert (row.label, row.line) == ("7", 3)


@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_a_byte_order_mark_and_unicode(newline, tmp_path):
    text = newline.join(["path,caption", "x.wav,  Cafe\u0301 \u0645\u0631 \U0001f415 "])
    (row,) = read_manifest(write(tmp_path / "m.csv", b"\xef\xbb\xbf" + text.encode()))
    assert row.captions == ("Caf\u00e9 \u0645\u0631 \U0001f415",)
    line = b'\xef\xbb\xbf{"path": "x.wav", "caption": "a"}'
    assert read_manifest(write(tmp_path / "m.jsonl", line + newline.encode()))[0].line == 1


def test_rows_of_one_clip_merge_their_captions(tmp_path):
    rows = "x.wav,a,0,1\ny.wav,b,,\nx.wav,c,1,2\nx.wav,d,0,1\ny.wav,e,0,\nx.wav,f,0,2\n"
    clips = read_manifest(write(tmp_path / "m.csv", "path,caption,start,end\n" + rows))
    assert [(r.path.name, r.captions, r.start, r.line) for r in clips] == [
        ("x.wav", ("a", "d"), 0.0, 2),
        ("y.wav", ("b", "e"), 0.0, 3),
        ("x.wav", ("c",), 1.0, 4),
        ("x.wav", ("f",), 0.0, 7),
    ]


def test_splits(tmp_path):
    manifest = write(
        tmp_path / "m.csv", "path,caption,split\na.wav,a,train\nb.wav,b,test\nc.wav,c,train\n"
    )
    assert [r.path.name for r in read_manifest(manifest, "train")] == ["a.wav", "c.wav"]
    assert len(read_manifest(manifest)) == 3
    with pytest.raises(ManifestError, match=r"'val', there are: test, train"):
        read_manifest(manifest, "val")
    without = write(tmp_path / "n.csv", "path,caption\na.wav,a\n")
    assert len(read_manifest(without, "val")) == 1


def test_a_folder_with_captions_beside_the_files(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.wav", "sub/a.FLAC", "notes.md"):
        (tmp_path / name).touch()
    write(tmp_path / "b.txt", "one\n\n two \n")
    write(tmp_path / "sub" / "a.json", '{"caption": ["three"], "label": "dog", "split": "val"}')
    first, second = read_manifest(tmp_path)
    assert (first.path, first.captions) == (tmp_path / "b.wav", ("one", "two"))
    assert second.path == tmp_path / "sub" / "a.FLAC"
    assert (second.captions, second.label, second.split) == (("three",), "dog", "val")
    (tmp_path / "c.wav").touch()
    with pytest.raises(
        ManifestError, match=r"c\.wav: found no captions, expected c\.txt or c\.json"
    ):
        read_manifest(tmp_path)
    write(tmp_path / "c.json", "[1]")
    with pytest.raises(ManifestError, match=r"c\.json, line 1: found a JSON list, expected an obj"):
        read_manifest(tmp_path)
    write(tmp_path / "c.json", "{")
    with pytest.raises(ManifestError, match=r"c\.json, line 1: found invalid JSON"):
        read_manifest(tmp_path)
    write(tmp_path / "c.json", b'{"caption": "\xff"}')
    with pytest.raises(ManifestError, match=r"c\.json, line 1: found byte 0xff, expected UTF-8"):
        read_manifest(tmp_path)


GOOD = '{"path": "x.wav", "caption": "a"}\n'
BAD = {
    "empty": ("m.csv", "", "found no rows"),
    "header_only": ("m.csv", "path,caption\n", "found no rows"),
    "empty_jsonl": ("m.jsonl", "\n", "found no rows"),
    "no_caption_column": ("m.csv", "path,text\nx,a\n",
        "line 1: found no 'caption', .*: path, text"),
    "no_path": ("m.jsonl", GOOD + '{"audio": 1, "caption": "a"}',
        "line 2: found no 'path'.*: audio"),
    "empty_caption": ("m.csv", "path,caption\nx,a\ny,  \n", "line 3: found caption ''"),
    "empty_caption_in_a_list": ("m.jsonl", '{"path": "x", "caption": ["a", ""]}',
        "line 1.*caption"),
    "empty_list": ("m.jsonl", '{"path": "x", "caption": []}', "line 1: found no captions"),
    "number_as_caption": ("m.jsonl", '{"path": "x", "caption": 3}', "line 1: found caption 3"),
    "empty_path": ("m.csv", "path,caption\n ,a\n", "line 2: found path ' '"),
    "number_as_path": ("m.jsonl", '{"path": 1, "caption": "a"}', "line 1: found path 1"),
    "bad_number": ("m.csv", "path,caption,end\nx,a,1\ny,a,2s\n",
        "line 3: found end '2s', .*number"),
    "negative": ("m.csv", "path,caption,start\nx,a,-1\n", "line 2: found start '-1'"),
    "nan": ("m.jsonl", '{"path": "x", "caption": "a", "duration_s": NaN}',
        "line 1: .*duration_s nan"),
    "infinite": ("m.csv", "path,caption,end\nx,a,inf\n", "line 2: found end 'inf'"),
    "true": ("m.jsonl", '{"path": "x", "caption": "a", "end": true}', "line 1: found end True"),
    "list_as_label": ("m.jsonl", '{"path": "x", "caption": "a", "label": []}',
        "line 1: found label"),
    "end_before_start": ("m.csv", "path,caption,start,end\nx,a,2,2\n",
        "line 2: found end 2, .*start 2"),
    "two_splits": ("m.csv", "path,caption,split\nx,a,train\nx,b,test\n",
        "line 3: found split 'test', expected 'train', as line 2"),
    "two_labels": ("m.csv", "path,caption,label\nx,a,dog\nx,b,cat\n", "line 3: found label 'cat'"),
    "json": ("m.jsonl", GOOD + "{path: 1}\n", r"line 2: found invalid JSON \("),
    "deep_json": ("m.jsonl", "[" * 100_000, "line 1: found invalid JSON"),
    "json_list": ("m.jsonl", "[1]\n", "line 1: found a JSON list"),
    "fields": ("m.csv", "path,caption\nx,a,b\n", "line 2: found 3 fields, expected the 2"),
    "quote": ("m.csv", 'path,caption\nx,"a" b\n', "line 2: found invalid CSV"),
    "latin_1": ("m.csv", b"path,caption\nx,a\ny,caf\xe9\n",
        "line 3: found byte 0xe9, expected UTF-8"),
    "utf_16": ("m.jsonl", GOOD.encode("utf-16"), "line 1: found byte 0xff, expected UTF-8"),
    "suffix": ("m.parquet", "x", "found .parquet, expected a folder, or a file"),
    "two_columns": ("m.csv", "path,caption,caption\nx,a,b\n",
        "line 1: found 2 columns 'caption', expected each name once"),
    "two_paths": ("m.csv", "path,path,caption\nx,y,b\n", "line 1: found 2 columns 'path'"),
    "path_and_file_name": ("m.csv", "path,file_name,caption\nx,y,b\n", "found both 'path' and"),
    "two_keys": ("m.jsonl", '{"path": "x", "caption": "a", "caption": "b"}', "twice 'caption'"),
    "nan_as_caption": ("m.csv", "path,caption\nx,nan\n", "line 2: found caption 'nan'"),
    "none_as_caption": ("m.csv", "path,caption\nx,None\n", "line 2: found caption 'None'"),
    "digit_as_caption": ("m.csv", "path,caption\nx,1\n", "line 2: found caption '1'"),
    "float_as_caption": ("m.jsonl", '{"path": "x", "caption": "0.25"}', "found caption '0.25'"),
    "list_in_a_cell": ("m.csv", "path,caption\nx,\"['a', 'b']\"\n", "line 2: .*rows of their own"),
    "json_in_a_cell": ("m.csv", 'path,caption\nx,"[""a"", ""b""]"\n', "line 2: .*caption_1"),
    "other_delimiter": ("m.csv", "path,caption\nx;a\ny;b\nz;c\n",
        "line 2: found fields separated by ';', expected ',', as in the header"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_manifest_is_refused_with_its_line(name, tmp_path):
    file, content, message = BAD[name]
    with pytest.raises(ManifestError, match=message) as caught:
        read_manifest(write(tmp_path / file, content))
    assert str(caught.value).startswith(str(tmp_path / file))


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("m.tsv", "path\tcaption\nx.wav\ta, b\n"),
        ("m.csv", "path;caption\nx.wav;a, b\n"),
        ("m.csv", "path|label|caption\nx.wav|dog|a, b\n"),
        ("m.csv", "file_name\tcaption\nx.wav\ta, b\n"),
        ("m.csv", 'file_name,caption\nx.wav,"a, b"\n'),
        ("m.tsv", 'path,caption\nx.wav,"a, b"\n'),
    ],
)
def test_delimiters_and_names_of_other_people(file, text, tmp_path):
    (row,) = read_manifest(write(tmp_path / file, text))
    assert row.path == tmp_path / "x.wav" and row.captions == ("a, b",)


def test_numbered_captions_and_a_root(tmp_path):
    text = "file_name," + ",".join(f"caption_{i}" for i in range(1, 6)) + "\nx.wav,a,b,,d,e\n"
    (row,) = read_manifest(write(tmp_path / "m.csv", text), root=tmp_path / "audio")
    assert row.captions == ("a", "b", "d", "e") and row.path == tmp_path / "audio" / "x.wav"
    with pytest.raises(ManifestError, match="line 2: found no captions"):
        read_manifest(write(tmp_path / "m.csv", "path,caption_1,caption_2\nx,,\n"))


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("m.csv", "path,label\nx.wav,dog\n"),
        ("m.jsonl", '{"path": "x.wav", "label": "dog"}'),
        ("m.tsv", "file_name\tlabel\tsplit\nx.wav\tdog\ttest\n"),
    ],
)
def test_a_label_needs_no_caption(file, text, tmp_path):
    (row,) = read_manifest(write(tmp_path / file, text))
    assert row.label == "dog" and row.captions == ()


def test_a_manifest_that_does_not_exist(tmp_path):
    with pytest.raises(ManifestError, match=r"m\.csv: No such file"):
        read_manifest(tmp_path / "m.csv")


def test_the_real_collection(shared_data):
    rows = read_manifest(shared_data / "manifest.csv")
    assert len(rows) == 984 and all(row.path.exists() for row in rows)
    assert sum(row.seconds for row in rows) == pytest.approx(3_802, abs=1)
    assert {row.split for row in rows} == {"train", "val", "test"}
