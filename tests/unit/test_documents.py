"""YAML and JSON documents: values, positions of fields, and syntax errors."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kproxy.documents.document import DocumentError, format_value
from kproxy.documents.parse import read_documents


def content(text: str) -> object:
    (document,) = read_documents(text.encode())
    return document.content


@pytest.mark.parametrize(
    ("scalar", "value"),
    [
        ("2026-11-20T23:44:08Z", "2026-11-20T23:44:08Z"),
        ("2026-11-20", "2026-11-20"),
        ("12:30", "12:30"),
        ("fd00::1", "fd00::1"),
        ("=", "="),
        ("on", True),
        ("No", False),
        ("010", 8),
        ("0080", "0080"),
        ("0x1F", 31),
        ("0b11", 3),
        ("-3", -3),
        ("1_000", 1000),
        ("1.5", 1.5),
        ("1e3", "1e3"),
        ("10.0.0.1", "10.0.0.1"),
        ("~", None),
        ("", None),
        ("null", None),
        ("!!timestamp 2026-11-20", "2026-11-20"),
    ],
)
def test_plain_yaml_scalars_are_read_as_in_kubectl(scalar: str, value: object) -> None:
    assert content(f"key: {scalar}\n") == {"key": value}


def test_merge_keys_and_anchors_with_overrides() -> None:
    text = "base: &b {x: 1, y: 2}\nother: {<<: *b, y: 3}\n"
    assert content(text) == {"base": {"x": 1, "y": 2}, "other": {"x": 1, "y": 3}}


def test_empty_documents_are_skipped() -> None:
    documents = read_documents(b"---\n# nothing\n---\na: 1\n---\n---\nb: 2\n")
    assert [document.content for document in documents] == [{"a": 1}, {"b": 2}]
    assert read_documents(b"") == []
    assert read_documents(b" \n\t\n", json=True) == []


def test_json_is_kept_as_text_without_its_byte_order_mark() -> None:
    (document,) = read_documents(b'\xef\xbb\xbf{"a": 1}')
    assert document.content == b'{"a": 1}'


def test_flow_mapping_is_yaml_unless_the_file_is_json() -> None:
    assert content("{a: 1}") == {"a": 1}
    with pytest.raises(DocumentError, match="not valid JSON"):
        read_documents(b"{a: 1}", json=True)


@pytest.mark.parametrize(
    ("text", "json", "message", "line", "column"),
    [
        ('{"a": 1,\n "b": 2,}', True, "not valid JSON: trailing comma in object", 2, 9),
        ('{"a":\n [1, 2', True, "not valid JSON: Input data was truncated", 2, 7),
        ('{"a": 1}\n{"b": 2}', True, "not valid JSON: trailing characters", 2, 2),
        ("a: 1\nb: [1,\nc: 2\n", False, "not valid YAML: while parsing a flow sequence", 4, 1),
        ("a: 1\n\tb: 2\n", False, "a tab character that violates indentation", 2, 1),
        ("a: 1\nb: *gone\n", False, "not valid YAML: found undefined alias", 2, 4),
        ("a: 1\nb: !thing x\n", False, "could not determine a constructor for the tag '!thing'", 2, 4),
        ("a: 1\nb:\n  c: 1\n  d: 1\n  c: 2\n", False, "duplicate key 'c'", 5, 3),
        ("ä: 1\nb: \x01\n", False, "control characters are not allowed", 2, 0),
        ("? [1]\n: 2\n", False, "unhashable key", 1, 3),
        ("a: !!int x\n", False, "a value does not match its tag", 0, 0),
        ("a: !!bool x\n", False, "a value does not match its tag", 0, 0),
        ('{"a":' * 200_000, True, "nested too deeply", 0, 0),
        ("[" * 200_000 + "]" * 200_000, False, "nested too deeply", 0, 0),
        ("- " * 200_000, False, "nested too deeply", 0, 0),
    ],
)
def test_syntax_error_has_a_reason_and_a_position(text: str, json: bool, message: str, line: int, column: int) -> None:
    with pytest.raises(DocumentError) as caught:
        read_documents(text.encode(), json=json)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (caught.value.line, caught.value.column) == (line, column)


def levels(first: str, level: str) -> str:
    """Return YAML in which each level refers ten times to the previous one. `level` contains `%s` for the aliases."""
    lines = [f"a0: &a0 {first}"]
    lines += [f"a{number}: &a{number} {level % ', '.join([f'*a{number - 1}'] * 10)}" for number in range(1, 12)]
    return "\n".join(lines)


EXPANDING = {
    "merges": levels("{a: 1, b: 2, c: 3}", "{<<: [%s]}"),
    "aliases in sequences": levels("[x, y, z]", "[%s]"),
    "aliases in mappings": levels("x", "{items: [%s]}"),
    "many aliases of one anchor": "a: &a [" + "x, " * 1000 + "]\nb: [" + "*a, " * 200 + "]",
}


@pytest.mark.parametrize("text", EXPANDING.values(), ids=EXPANDING)
def test_expansion_by_aliases_and_merges_is_limited(text: str) -> None:
    with pytest.raises(DocumentError, match="aliases and merges add more than 100,000 values") as caught:
        read_documents(text.encode())
    assert caught.value.line


@pytest.mark.parametrize("text", ["&a [*a, *a, *a]", "a: &a {b: {c: *a}}", "&a {x: &b [*a, *b], y: [*b, *a]}"])
def test_alias_of_its_own_container_does_not_expand_without_an_end(text: str) -> None:
    (document,) = read_documents(text.encode())
    assert document.line_of(()) == 1


def test_wide_yaml_is_not_nested_too_deeply() -> None:
    assert content("a: [" + "[], " * 1000 + "]") == {"a": [[]] * 1000}


def test_invalid_utf8_is_rejected_with_its_position() -> None:
    with pytest.raises(DocumentError, match="not UTF-8 text") as caught:
        read_documents(b"a: 1\nb: \xff\n")
    assert (caught.value.line, caught.value.column) == (2, 4)


YAML = "a: 1\nspec:\n  ports:\n    - port: 80\n      name: x\n    -\n      port: 81\n"
JSON = '{"a": "\\/ \\u00e4",\n\t"spec": {\n "ports": [{"port": 80,\n"name": "x"},\n\n {\n"port": 81}]}}'


@pytest.mark.parametrize(
    ("path", "in_yaml", "in_json"),
    [
        ((), 1, 1),
        (("spec",), 2, 2),
        (("spec", "ports", 0, "name"), 5, 4),
        (("spec", "ports", 1, "port"), 7, 7),
        (("spec", "ports", 1, "missing"), 7, 6),
        (("spec", "ports", 9), 3, 3),
        (("spec", "missing", 1), 2, 2),
        (("a", "b"), 1, 1),
    ],
)
def test_line_of_a_field(path: tuple[str | int, ...], in_yaml: int, in_json: int) -> None:
    assert read_documents(YAML.encode())[0].line_of(path) == in_yaml
    assert read_documents(JSON.encode(), json=True)[0].line_of(path) == in_json


def test_lines_of_later_documents_count_from_the_start_of_the_file() -> None:
    assert read_documents(b"a: 1\n---\n\nb:\n  c: 1\n")[1].line_of(("b", "c")) == 5


def test_unknown_line_is_0() -> None:
    text = '{"emoji": "\\ud83d\\ude00",\n"b": 1}'  # libyaml rejects escaped surrogates, which are valid in JSON
    assert read_documents(text.encode(), json=True)[0].line_of(("b",)) == 0


@given(st.binary(max_size=60), st.booleans())
def test_any_bytes_are_read_or_raise_document_error(text: bytes, json: bool) -> None:
    with suppress(DocumentError):
        read_documents(text, json=json)


@given(st.text(alphabet="ab01 :-[]{}\"'#&*!|>%@\n\t,?~.<=", max_size=60))
def test_any_yaml_is_read_or_raises_document_error(text: str) -> None:
    with suppress(DocumentError):
        for document in read_documents(text.encode()):
            assert document.line_of(("a", 0, "b")) > 0


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("http", '"http"'),
        (5, "5"),
        (None, "null"),
        ({"a": [True, 1.5]}, '{"a":[true,1.5]}'),
        ("x" * 100, '"' + "x" * 76 + "..."),
        ({(1, 2): 3}, "a dict"),
        ("\ud800", "a str"),
    ],
)
def test_values_in_messages_are_shortened_json(value: object, text: str) -> None:
    assert format_value(value) == text
