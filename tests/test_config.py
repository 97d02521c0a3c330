"""A wrong key, type or value is an error of one line that names it and the nearest valid one."""

import dataclasses
import json
import typing
from pathlib import Path

import pytest

from tcc_jax import config as config_module
from tcc_jax.config import Config, ModelConfig, from_dict, parse_command_line, read_toml
from tcc_jax.terminal import UserError


def toml(tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[modle]\nwidth = 64", "no section [modle]; the nearest is model"),
        ("[model]\nnum_layer = 2", "no field model.num_layer; the nearest is model.num_layers"),
        ("[training]\nbatch = 2", "no field training.batch; the nearest is training.batch_rows"),
        ("[model]\nwidth = 64.5", "model.width = 64.5: must be of type int"),
        ("[model]\nwidth = true", "model.width = True: must be of type int"),
        ('[training]\nsteps = "10"', "training.steps = '10': must be of type int"),
        ("[run]\ndirectory = 3", "run.directory = 3: must be of type str"),
        ("[objective]\nfrequency_bias = 1", "objective.frequency_bias = 1: must be of type bool"),
        (
            '[model]\nposition = "rop"',
            "model.position = 'rop': must be one of none, learned, rope; the nearest is rope",
        ),
        ("[model]\nposition = 1", "model.position = 1: must be one of none, learned, rope"),
        ("steps = 3", "no section [steps]; steps is a field of [training]"),
        ("[training]\nsteps = 0", "training.steps = 0: must lie between 1 and 2,147,483,647"),
        ("[optimizer]\nlearning_rate = nan", "optimizer.learning_rate = nan: must lie between 0 and"),
        ("[model]\nwidth = 100\nnum_heads = 12", "must be a multiple of model.num_heads = 12"),
        ('[model]\nwidth = 9\nnum_heads = 3\nposition = "rope"', "must be even when model.position = 'rope'"),
        ("[objective]\ncut_low = 0.5\ncut_high = 0.5", "objective.cut_low = 0.5: must be under objective.cut_high"),
        ("[objective]\nprompt_genes = 9", "objective.prompt_genes = 9: needs objective.kind = 'remaining-set' and"),
        ("[objective]\nprompt_genes = 9\ncut_points = 2", "prompt_genes = 9: needs objective.cut_high under 1"),
        (
            "[objective]\nprompt_genes = 99\ncut_points = 2\ncut_high = 0.6\n[training]\nrow_length = 64",
            "objective.prompt_genes = 99: must be under training.row_length = 64",
        ),
        ("[mesh]\ndata = 0", "mesh.data = 0: must be -1"),
        ("model = 3", "model must be a section"),
        ("[model\n", "not valid TOML"),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path, text, words):
    with pytest.raises(UserError) as caught:
        read_toml(toml(tmp_path, text))
    message = str(caught.value)
    assert words in message
    assert message.startswith(f"{tmp_path / 'run.toml'}: ")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.toml: cannot read the configuration: No such file"):
        read_toml(tmp_path / "nowhere.toml")
    with pytest.raises(UserError, match="cannot read the configuration: Is a directory"):
        read_toml(tmp_path)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a text file"):
        read_toml(tmp_path / "binary.toml")


def test_a_configuration_survives_toml_and_json(tmp_path):
    path = toml(tmp_path, '[model]\nwidth = 96\nposition = "rope"\ndropout = 0\n[run]\nseed = 7\n')
    config = read_toml(path)
    assert config.model == dataclasses.replace(ModelConfig(), width=96, position="rope", dropout=0.0)
    assert isinstance(config.model.dropout, float)
    assert config.run.seed == 7
    assert from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert from_dict({}) == Config()


def test_the_command_line_changes_fields_of_the_file(tmp_path):
    path = str(toml(tmp_path, "[model]\nwidth = 96\nnum_layers = 3\n"))
    arguments = ["--model.num-layers", "6", "--objective.no-frequency-bias", "--run.directory", "here"]
    config = parse_command_line([path, *arguments])
    assert (config.model.width, config.model.num_layers) == (96, 6)
    assert config.objective.frequency_bias is False
    assert config.run.directory == "here"
    config = parse_command_line([path, "--resume", "last-good", "--init-from=old"])
    assert (config.checkpoint.resume, config.checkpoint.init_from) == ("last-good", "old")


@pytest.mark.parametrize("text", ["", '[data]\nlibrary_weights = {A = 2.0, "B C" = 1}\n'])
def test_a_table_on_the_command_line_replaces_that_of_the_file(tmp_path, text):
    path = str(toml(tmp_path, text))
    written = read_toml(path).data.library_weights
    for words, expected in [
        ([], written),
        (["--data.library-weights", "B", "3"], {"B": 3.0}),
        (["--data.library-weights", "B C", "0.5", "D", "0", "--run.seed", "7"], {"B C": 0.5, "D": 0.0}),
        (["--data.library-weights"], {}),
    ]:
        assert parse_command_line([path, *words]).data.library_weights == expected
    for words, mistake in [(["B"], "must be pairs of a name and a number"), (["B", "x"], "'x'")]:
        with pytest.raises(UserError, match=f"--data.library-weights.*{mistake}"):
            parse_command_line([path, "--data.library-weights", *words])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model.num-layer", "6"], "--model.num-layers"),
        (["--model.num-layers", "six"], "--model.num-layers"),
        (["--model.position", "ropes"], "rope"),
        (["--training.steps", "0"], "command line: training.steps = 0: must lie between 1 and"),
        (["--model.width", "100"], "command line: model.width = 100: must be a multiple of model.num_heads = 12"),
        (["surplus"], "surplus"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(tmp_path, arguments, words):
    with pytest.raises(UserError) as caught:
        parse_command_line([str(toml(tmp_path, "")), *arguments])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("arguments", [[], ["--model.width", "64"]])
def test_the_file_comes_first(arguments):
    with pytest.raises(UserError, match="the first argument must be the TOML file"):
        parse_command_line(arguments)


def test_help_needs_no_file_and_gives_the_meaning_of_every_field(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_command_line(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    source = Path(config_module.__file__).read_text()
    for section in dataclasses.fields(Config):
        for field in dataclasses.fields(typing.get_type_hints(Config)[section.name]):
            assert f"--{section.name}.{field.name.replace('_', '-')}" in text
            # The docstring under the field: its first words turn up in the help.
            after = source.split(f"\n    {field.name}: ")[1]
            assert " ".join(after.split('"""')[1].split()[:3]) in text


def test_every_number_has_bounds():
    for section in dataclasses.fields(Config):
        kinds = typing.get_type_hints(typing.get_type_hints(Config)[section.name], include_extras=True)
        assert not [f"{section.name}.{name}" for name, kind in kinds.items() if kind in (int, float)]
