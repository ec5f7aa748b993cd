"""Settings: which values are accepted, which are refused in one line, and the help of every setting."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from job import config as settings
from job.errors import UserError
from job.model.flops import flops_per_token, parameter_counts
from job.model.spec import ModelSpec

PRESETS = sorted(Path("configs").glob("*.yaml"))
QWEN2_VOCAB_SIZE = 151_646
UNITLESS = {
    *("data.seed", "train.seed", "generate.seed"),
    *("data.validation_fraction", "generate.temperature", "generate.top_p", "train.spike_factor"),
    *("model.rope_theta", "model.rms_norm_eps", "model.initializer_range", "train.epsilon"),
    *("train.learning_rate", "train.min_learning_rate", "train.weight_decay", "train.beta1", "train.beta2"),
    *("train.gradient_clipping", "train.muon_learning_rate", "train.muon_momentum"),
}
"""Numbers that are no time, no size and no count: they have no unit."""
UNIT_OF_KIND = {"length of time": "with a unit in its value", "range of steps": "steps"}
"""Types whose name tells the unit."""


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_preset_has_every_setting_with_its_generated_help(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    header, _, body = text.partition("\n\n")
    assert all(line.startswith("#") for line in header.splitlines())
    assert body == settings.to_yaml(settings.load(str(path)))


def test_reading_printed_settings_gives_the_same_settings() -> None:
    changed = settings.load(
        None,
        [
            ("train.learning_rate", "3e-4"),
            ("data.slice_bytes", "1MiB"),
            ("run.name", "no: 1"),
            ("train.profile_steps", "10:13"),
            ("run.output", "a: b #c\u2028\x7f\U0001f642"),
            ("generate.prompts", json.dumps(["a: b #c\u2028\x7f\x85\U0001f642", "null", "", "1", "北京\n"])),
            ("tracking.log_dir", "null "),
            ("data.source", "~"),
        ],
    )
    assert settings.build(yaml.safe_load(settings.to_yaml(changed))) == changed


def test_every_setting_has_help_and_every_quantity_has_a_unit() -> None:
    for setting in settings.settings():
        assert setting.meaning and not setting.meaning.endswith("."), setting.name
        kind = setting.kind.removesuffix(" or null").removesuffix(" or auto")
        if kind in ("whole number", "number", "size"):
            assert bool(setting.unit) != (setting.name in UNITLESS), setting.name
            assert setting.unit in setting.type_and_unit, setting.name
        else:
            assert kind in UNIT_OF_KIND or not re.search("number|size|time|range", kind), setting.name
            assert not setting.unit, setting.name
        for unit in ("seconds", "minutes", "bytes", "tokens", "steps"):
            if setting.name.endswith(f"_{unit}"):
                assert unit in setting.type_and_unit, setting.name
    assert {setting.name for setting in settings.settings()} >= UNITLESS
    assert len({setting.name for setting in settings.settings()}) == len(settings.settings())


def test_temperature_is_0_or_a_number_by_which_logits_can_be_divided() -> None:
    for text in ("1e-310", "1e-40", "0.0009", "-1"):
        said = rf"^generate\.temperature: '{text}': expected number: 0, or at least 0\.001; see --help$"
        with pytest.raises(UserError, match=said):
            settings.load(None, [("generate.temperature", text)])
    for text in ("0", "0.001", "1e12"):
        assert settings.load(None, [("generate.temperature", text)]).generate.temperature == float(text)


def test_command_line_beats_file_which_beats_defaults(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("train:\n  epochs: 7\n  micro_batch_size: 3\n")
    found = settings.load(str(path), [("train.micro_batch_size", "5")]).train
    assert (found.epochs, found.micro_batch_size, found.context_length) == (7, 5, 512)


@pytest.mark.parametrize(
    ("written", "value"),
    [("5e-4", 5e-4), ("1E-3", 1e-3), ("0.1", 0.1), (".5", 0.5)],
)
def test_yaml_numbers_may_use_common_notations(tmp_path: Path, written: str, value: float) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(f"train:\n  learning_rate: {written}\n")
    assert settings.load(str(path)).train.learning_rate == value


def test_values_without_quotes_mean_what_they_look_like(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(
        "run: {output: on, name: 2026-11-29}\n"
        "train: {warmup_steps: 010, epochs: 0x10, max_steps: 1_000, profile_steps: 10:13}\n"
        "data: {loader_workers: +3}\n"
    )
    found = settings.load(str(path))
    assert (found.run.output, found.run.name) == ("on", "2026-11-29")
    assert (found.train.warmup_steps, found.train.epochs, found.train.max_steps) == (10, 16, 1000)
    assert found.data.loader_workers == 3
    assert found.train.profile_steps == settings.load(None, [("train.profile_steps", "10:13")]).train.profile_steps


@pytest.mark.parametrize(
    "text", ["on", "010", "0o10", "1e5", "1:30", "2026-11-29", "true", "null", "~", "<<", ".5", "=", "1_0"]
)
def test_text_that_looks_like_another_type_is_read_back_as_text(tmp_path: Path, text: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(settings.to_yaml(settings.load(None, [("run.output", text)])))
    assert settings.load(str(path)).run.output == text


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("train.learnin_rate", "train.learning_rate"),
        ("trian.learning_rate", "train.learning_rate"),
        ("learning_rate", "train.learning_rate"),
        ("train.lr", "train.learning_rate"),
        ("model.hiden_size", "model.hidden_size"),
        ("data.shard", "data.shards"),
        ("checkpoint.evry", "checkpoint.every"),
    ],
)
def test_unknown_setting_error_suggests_the_nearest_one(typed: str, meant: str) -> None:
    with pytest.raises(UserError, match=rf"^{typed}: unknown setting; did you mean {meant}\?$"):
        settings.load(None, [(typed, "1")])


def test_one_error_lists_all_unknown_keys(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("train:\n  lr: 1\n  epochs: many\nblock_size: 8\ntrian:\n  epochs: 1\nmodel: 3\n")
    with pytest.raises(UserError) as caught:
        settings.load(str(path), [("train.fp16", "true"), ("train.epochs", "3")])
    assert str(caught.value) == (
        "settings: 5 mistakes: "
        "(1) train.lr: 1: unknown setting; did you mean train.learning_rate? "
        "(2) block_size: 8: unknown setting; did you mean train.context_length? "
        "(3) trian: unknown section of settings; did you mean train? "
        "(4) model: 3: expected settings under it (key: value); see configs/demo.yaml "
        "(5) train.fp16: unknown setting; did you mean train.precision, which is auto, bf16, fp16, tf32 or fp32?"
    )


def test_one_error_lists_each_wrong_value_once() -> None:
    with pytest.raises(UserError, match=r"^settings: 3 mistakes: \(1\) train.compile: .*\(2\) .*\(3\) train.max_time"):
        settings.load(None, [("train.epochs", "many"), ("train.compile", "perhaps"), ("train.max_time", "soon")])


def test_long_list_of_mistakes_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("".join(f"a{number}: 1\n" for number in range(2_000)))
    with pytest.raises(UserError, match=r"^settings: more than 20 mistakes: .* \(20\) [^(]* and more$"):
        settings.load(str(path))


ABSURD = ["1" + "0" * 400, "-1" + "0" * 400, "nan", "inf", "-inf", "1e999", "9" * 6000, "1e19GiB", "9" * 400 + "h"]


@pytest.mark.parametrize(
    "name", [setting.name for setting in settings.settings() if re.search("number|size|length|range", setting.kind)]
)
def test_absurd_numbers_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    section, _, key = name.partition(".")
    in_yaml = [*ABSURD, ".nan", ".inf", "-.inf", "0x" + "f" * 20000]
    for value in ABSURD:
        with pytest.raises(UserError, match=rf"^{name}: .*expected") as caught:
            settings.load(None, [(name, value)])
        assert len(str(caught.value)) < 700
    for value in in_yaml:
        path.write_text(f"{section}: {{{key}: {value}}}")
        with pytest.raises(UserError, match=rf"^({name}: .*expected|--config: .*thousands of digits)") as caught:
            settings.load(str(path))
        assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.hidden_size", "0"),
        ("model.hidden_size", "-8"),
        ("model.hidden_size", "100000000000"),
        ("model.num_hidden_layers", "1000000"),
        ("train.context_length", "1000000000"),
        ("train.micro_batch_size", "10000000"),
        ("train.learning_rate", "1e300"),
        ("tokenizer.train_bytes", "1:30"),
        ("run.output", "a\0b"),
        ("generate.prompts", '["a\\0b"]'),
    ],
)
def test_impossible_value_is_refused(name: str, value: str) -> None:
    with pytest.raises(UserError, match=rf"^{name}: .*: expected"):
        settings.load(None, [(name, value)])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train:\n  epoch: 1\n", r"^train\.epoch: 1: unknown setting; did you mean train\.epochs\?$"),
        ("trian:\n  epochs: 1\n", r"^trian: unknown section of settings; did you mean train\?$"),
        ("train:\n  epochs: many\n", r"^train\.epochs: 'many': expected whole number"),
        ("train:\n  epochs: 1.5\n", r"^train\.epochs: 1\.5: expected whole number"),
        ("train:\n  epochs: yes\n", r"^train\.epochs: 'yes': expected whole number"),
        ("train:\n  epochs: 0\n", r"^train\.epochs: 0: expected whole number.*greater than or equal to 1"),
        ("train:\n  epochs: null\n", r"^train\.epochs: expected whole number"),
        ("train:\n  epochs: [1]\n", r"^train\.epochs: \[1\]: expected whole number"),
        ("train:\n  strategy: zero3\n", r"^train\.strategy: 'zero3': expected auto \| zero2 \| ddp"),
        ('train:\n  profile_steps: "13:10"\n', r"^train\.profile_steps: '13:10': expected range of steps.*later"),
        ("train:\n  max_steps: 1:30\n", r"^train\.max_steps: '1:30': expected whole number"),  # not YAML 1.1's base 60
        (
            "run: &a {name: x}\ntrain:\n  <<: *a\n",
            r"line 3, column 3: merge keys \(<<\) are not read; write the settings",
        ),
        ("generate:\n  prompts: 北京\n", r"^generate\.prompts: '北京': expected list of texts"),
        ("data:\n  slice_bytes: 64 parsecs\n", r"^data\.slice_bytes: '64 parsecs': expected size in bytes"),
        ("train: 3\n", r"^train: 3: expected settings under it"),
        ("- train\n", r"^--config: .*expected sections with settings, found list"),
        ("train:\n  epochs: 1\n  epochs: 2\n", r"^--config: .*not valid YAML.*'epochs' occurs twice"),
        (
            "train: {epochs: 1\n",
            r"not valid YAML: line 2, column 1: expected .*\(while .*, from line 1, column 8 on\)$",
        ),
        ("train:\n\tepochs: 1\n", r"not valid YAML: line 2 begins with a tab; YAML indents with spaces$"),
        ("train:\r\n  seed: 1\r\n \tepochs: 1\r\n", r"not valid YAML: line 3 begins with a tab; YAML indents with"),
        ("train：\n  epochs: 1\n", r'not valid YAML: line 1 has a full-width colon \(：\); write ":"$'),
        ("train：5\n", r"not valid YAML: line 1 has a full-width colon"),
        ("train:\n  epochs：1\n", r"not valid YAML: line 2 has a full-width colon"),
        ("train:\n  seed: 1\n  epochs：1\n", r"not valid YAML: line 3 has a full-width colon"),
        ("train:\n  epochs：1\n  seed: 1\n", r"not valid YAML: line 2 has a full-width colon"),
        (
            "train.epochs: 5\ngenerate.prompts: [北京, '1']\n",
            r"^settings: 2 mistakes: "
            r'\(1\) train\.epochs: 5: .*; write "train:" and below it, indented, "epochs: 5" '
            r"\(2\) generate\.prompts: .*; write \"generate:\" and below it, indented, \"prompts: \[北京, '1'\]\"$",
        ),
    ],
)
def test_wrong_file_gives_one_line_that_names_the_setting(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=said) as caught:
        settings.load(str(path))
    assert "\n" not in str(caught.value)
    assert "<unicode string>" not in str(caught.value)


def test_full_width_colons_in_texts_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("generate:\n  prompts: [Q：长城, 问：北京]\nrun:\n  name: a：b\n", encoding="utf-8")
    config = settings.load(str(path))
    assert (config.generate.prompts, config.run.name) == (["Q：长城", "问：北京"], "a：b")


@pytest.mark.parametrize("encoding", ["gb18030", "utf-16"])
def test_printed_command_converts_a_settings_file(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "my job.yaml"
    path.write_text("run:\n  name: 长城\n", encoding=encoding)
    with pytest.raises(UserError, match="is not UTF-8") as caught:
        settings.load(str(path))
    subprocess.run(caught.value.remedy.partition(": ")[2], shell=True, check=True)
    assert settings.load(str(tmp_path / "my job-utf8.yaml")).run.name == "长城"


def test_url_passwords_are_neither_recorded_nor_shown() -> None:
    secret = settings.load(None, [("data.source", "https://me:hunter2@example.org/wiki.jsonl")])
    assert "hunter2" not in str(settings.to_dict(secret))
    assert "hunter2" not in str(UserError("data.source", secret.data.source, "is not there"))


def test_tutorial_model_has_its_parameter_count_and_flops() -> None:
    preset = settings.load("configs/wiki-123m.yaml")
    spec = ModelSpec(**preset.model.model_dump())
    parameters = parameter_counts(spec, QWEN2_VOCAB_SIZE)
    assert round(parameters.total / 1e6, 2) == 123.28
    assert round(parameters.embedding / 1e6, 1) == 77.6
    assert round(flops_per_token(spec, QWEN2_VOCAB_SIZE, preset.train.context_length).total / 1e6) == 758


def test_tutorial_preset_has_the_exact_hyperparameters() -> None:
    train = settings.load("configs/wiki-123m.yaml").train
    assert train.global_batch_size * train.context_length == 131_072
    assert (train.epochs, train.warmup_steps) == (2, 200)
    assert (train.learning_rate, train.weight_decay) == (5e-4, 0.1)
    assert {train.micro_batch_size, train.precision, train.strategy} == {"auto"}, "these change no batch"
    preset = settings.load("configs/wiki-123m.yaml")
    assert (preset.data.validation_fraction, preset.data.seed) == (0.1, 2333)
    assert (preset.evaluate.every, preset.checkpoint.every, preset.checkpoint.keep) == (500, 500, 10)
    assert preset.generate.prompts == ["人工智能", "牛顿", "北京市", "亚洲历史"]
    assert preset.tokenizer.source == "Qwen/Qwen2-0.5B"
    assert preset.data.source == "fjcanyue/wikipedia-zh-cn"
    assert preset.data.shards.startswith("s3://")


ALIASES = "a: &a [1]\n" + "\n".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 10)}]" for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)
MERGES = ALIASES.replace("[1]", "{k: 1}").replace(" [*", " {<<: [*").replace("]", "]}")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[" * 5000, "nested too deeply"),
        (b"train: " + b"{a: " * 100, "not valid YAML"),
        (b"train: " + b"[" * 100 + b"]" * 100, "nested too deeply"),
        (ALIASES.encode(), "more than 100,000 values"),
        (MERGES.encode(), "more than 100,000 values"),
        (b"&a [*a]", "nested too deeply"),
        (bytes(range(256)), r"is not UTF-8, from byte 128 on; if it is in GBK: iconv .* > .*/job-utf8\.yaml$"),
        ("train: {}".encode("utf-16"), "is not UTF-8, from byte 0 on; if it is in UTF-16: iconv -f utf-16 -t utf-8"),
        (b"#" * 2**21, "larger than 1 MiB"),
        (b"train: {seed: " + b"9" * 5000 + b"}", "not valid YAML"),
        (b"? [a]\n: b", "a key is a list"),
        (b"train: {seed: 3\0}", "not valid YAML"),
        (b"train: {weight_decay: .nan}", "should be a finite number"),
        (b"train: 3", "expected settings under it"),
        (b"train: [3]", "expected settings under it"),
        (b"- train", "found list"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_file_without_settings_gives_one_line(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        settings.load(str(path), [("train.seed", "3")])
    assert len(str(caught.value)) < 400


def test_folder_as_settings_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--config: .* cannot be read: .*Is a directory"):
        settings.load(str(tmp_path))
