"""``--json`` and the model of the store at ``--out``."""

import json

from clipkit.cli import index as index_commands
from clipkit.tasks.config import init_config


def test_init_prints_json(run, colour_folder, tmp_path):
    out, _ = run("init", colour_folder, "--out", tmp_path / "a.toml", "--json")
    expected = init_config(colour_folder)
    assert json.loads(out) == {
        "config": str(tmp_path / "a.toml"),
        "images": 12,
        "image_side": expected.image_side,
        "text": expected.text,
    }


def test_the_model_of_the_store_is_used_without_model(
    run, colour_folder, tiny_checkpoint, tmp_path
):
    words = ("embed", colour_folder, "--out", tmp_path / "store")
    run(*words, "--model", tiny_checkpoint)
    out, err = run(*words, "--json")
    assert f"using the model of the store {tmp_path / 'store'}" in err
    words = ("index", "build", colour_folder, "--out", tmp_path / "index")
    run(*words, "--model", tiny_checkpoint)
    built, err = run(*words, "--json")
    assert f"using the model of the store {tmp_path / 'index.store'}" in err
    facts = json.loads(built)
    assert (facts["spec"], facts["vectors"]) == ("Flat", 12)
    assert facts["model"] == json.loads(out)["model"]


def test_index_commands_are_listed_in_order_of_use():
    names = [command.name for command in index_commands.app.registered_commands]
    assert " ".join(map(str, names)) == "build add sync remove compact merge check calibrate"
