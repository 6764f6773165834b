"""Options and recipes: what is merged how, and the one line for every misspelt key."""

import pytest
import yaml

from latentae.errors import RequestError
from latentae.training.cli import CommandLine, quiet_libraries
from latentae.training.config import explain_value, merge, options, with_recipe_files

RECIPE = {
    "model": {
        "autoencoder": {"preset": "dc-ae-tiny"},
        "objective": {"l1": {"class_path": "L1", "init_args": {"weight": 1.0}}},
        "adversary": {"discriminator": {"class_path": "PatchGAN", "init_args": {"channels": 8}}, "weight": 0.1},
        "optimizer": {"class_path": "AdamW", "init_args": {"lr": 0.001, "betas": [0.9, 0.99]}},
        "schedule": {"warmup_steps": 2},
    },
    "data": {"path": "photos", "size": 32},
    "trainer": {"max_steps": 6, "callbacks": [{"class_path": "ModelCheckpoint", "init_args": {"monitor": "val/l1"}}]},
}


@pytest.fixture
def recipe(tmp_path):
    def write(**changes):
        config = yaml.safe_load(yaml.safe_dump(RECIPE))
        for dotted, value in changes.items():
            node = config
            *path, last = dotted.split("__")
            for key in path:
                node = node.setdefault(key, {}) if isinstance(node, dict) else node[int(key)]
            node[last] = value
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(config))
        return str(path)

    return write


def parse(*argv):
    with quiet_libraries():
        return CommandLine(list(argv)).config


MISSPELT_OPTIONS = {
    "--modl.ema=0.9": "modl is unknown; did you mean model?",
    "--trainer.max_stps=3": "trainer.max_stps is unknown; did you mean max_steps?",
    "--data.pth=x": "data.pth is unknown; did you mean path?",
    "--rundir=x": "rundir is unknown; did you mean run_dir?",
    "--checkpoint.every=3": "checkpoint.every is unknown; did you mean keep_every?",
    "--model.objectiv.l1.weight=2": "model.objectiv is unknown; did you mean objective?",
    "--model.objective.l1.wieght=2": "model.objective.l1.wieght is unknown; did you mean weight?",
    "--model.objective.l1.init_args.wieght=2": "model.objective.l1.wieght is unknown; did you mean weight?",
    "--model.objective.l2=null": "model.objective.l2 is unknown; known are l1.",
    "--model.objective.new=LPIP": "model.objective.new names a class; 'LPIP' is unknown; did you mean LPIPS?",
    "--model.objective.l1={wieght: 2}": "model.objective.l1.wieght is unknown; did you mean weight?",
    "--model.adversary.wait=3": "model.adversary.wait is unknown; did you mean weight?",
    "--model.adversary.discriminator.chanels=3": (
        "model.adversary.discriminator.chanels is unknown; did you mean channels?"
    ),
    "--model.optimizer.lrr=3": "model.optimizer.lrr is unknown; did you mean lr?",
    "--model.schedule.warm_up_steps=3": "model.schedule.warm_up_steps is unknown; did you mean warmup_steps?",
    "--trainer.callbacks+=ModelCheckpiont": (
        "trainer.callbacks names a class; 'ModelCheckpiont' is unknown; did you mean ModelCheckpoint?"
    ),
}


@pytest.mark.parametrize(
    ("option", "start", "known"),
    [
        ("--model.objective.new={weight: 3}", "model.objective.new names no class; known are ", "Charbonnier, "),
        ("--model.latent_transforms+={eq_prob: .5}", "model.latent_transforms names no class; ", "Equivariance, "),
        ("--model.latent_transforms=[{eq_prob: .5}]", "model.latent_transforms names no class; ", "Equivariance, "),
    ],
)
def test_arguments_without_a_class_are_told_the_classes(recipe, option, start, known):
    with pytest.raises(RequestError) as caught:
        parse("--config", recipe(), option)
    assert str(caught.value).startswith(start)
    assert known in str(caught.value)


@pytest.mark.parametrize("option", MISSPELT_OPTIONS)
def test_a_misspelt_option_is_one_line_with_the_nearest_right_one(recipe, option):
    with pytest.raises(RequestError) as caught:
        parse("--config", recipe(), option)
    assert str(caught.value) == MISSPELT_OPTIONS[option]


MISSPELT_KEYS = {
    "modl": ({}, "modl is unknown; did you mean model?"),
    "trainer__max_stps": (3, "trainer.max_stps is unknown; did you mean max_steps?"),
    "model__objectiv": ({}, "model.objectiv is unknown; did you mean objective?"),
    "model__objective__l1__init_args__wieght": (2, "model.objective.l1.wieght is unknown; did you mean weight?"),
    "model__objective__l1__init_arg": ({}, "model.objective.l1.init_arg is unknown; did you mean init_args?"),
    "model__objective__l1__class_path": (
        "Charbonier",
        "model.objective.l1 names a class; 'Charbonier' is unknown; did you mean Charbonnier?",
    ),
    "model__adversary__discriminator__init_args__chanels": (
        3,
        "model.adversary.discriminator.chanels is unknown; did you mean channels?",
    ),
    "model__optimizer__init_args__lrr": (2, "model.optimizer.lrr is unknown; did you mean lr?"),
    "model__optimizer__class_path": ("AdamX", "model.optimizer names a class; 'AdamX' is unknown; did you mean Adam?"),
    "trainer__callbacks__0__init_args__monitr": (2, "trainer.callbacks.monitr is unknown; did you mean monitor?"),
    "model__objective__l1__class_path ": (
        "nowhere.L1",
        "model.objective.l1 names the class 'nowhere.L1', which cannot be imported.",
    ),
}


@pytest.mark.parametrize("key", MISSPELT_KEYS)
def test_a_misspelt_key_in_a_recipe_is_one_line_with_the_nearest_right_one(recipe, key):
    value, message = MISSPELT_KEYS[key]
    with pytest.raises(RequestError) as caught:
        parse("--config", recipe(**{key.strip(): value}))
    assert str(caught.value) == message


WRONG_VALUES = {
    "--model.gradient_clip=much": "model.gradient_clip expects float or null, got much.",
    "--trainer.max_steps=many": "trainer.max_steps expects int, got many.",
    "--model.adversary.loss=hing": (
        "model.adversary.loss expects Literal['hinge', 'non_saturating', 'vanilla'] or null, got hing."
    ),
    "--data.workers": "argument --data.workers: expected one argument",
}


@pytest.mark.parametrize("option", WRONG_VALUES)
def test_a_value_of_the_wrong_type_is_one_line(recipe, option):
    with pytest.raises(RequestError) as caught:
        parse("--config", recipe(), option)
    assert str(caught.value) == WRONG_VALUES[option]


def test_messages_that_it_does_not_know_are_flattened():
    assert explain_value("something\n  odd\n") == "something odd"


@pytest.mark.parametrize(
    ("text", "message"),
    [("model: [unclosed", "is not YAML"), ("just words", "is no recipe"), ("", "is no recipe")],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path, text, message):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(RequestError, match=f"broken.yaml {message}"):
        parse("--config", str(path))


def test_a_recipe_that_does_not_exist_gives_the_nearest():
    with pytest.raises(RequestError, match="did you mean demo"):
        parse("--config", "dmeo")
    with pytest.raises(RequestError, match="did you mean dcae/f32c32-phase"):
        parse("--config", "dcae/f32c32-phas1")


@pytest.mark.parametrize("word", ["stray", "3", "-"])
def test_words_without_an_option_are_refused(word):
    with pytest.raises(RequestError, match=f"'{word}' belongs to no option"):
        list(options(["--run_dir", "x", word]))


def test_options_change_a_recipe_with_and_without_init_args(recipe):
    config = parse(
        "--config", recipe(),
        "--model.objective.l1.weight", "0.5",
        "--model.objective.haar=HaarDetail",
        "--model.objective.haar.init_args.levels=3",
        "--model.adversary.discriminator.init_args.layers", "2",
        "--model.optimizer.lr", "1e-5",
        "--model.autoencoder.latent_channels", "4",
        "--data.workers=0",
    )  # fmt: skip
    model = config.model
    assert model.objective["l1"].init_args.weight == 0.5
    assert model.objective["haar"].init_args.levels == 3
    assert model.adversary.init_args.discriminator.init_args.layers == 2
    assert model.adversary.init_args.discriminator.init_args.channels == 8
    assert model.optimizer.init_args.lr == 1e-5
    assert model.autoencoder == {"preset": "dc-ae-tiny", "latent_channels": 4}
    assert config.data.workers == 0
    model = parse("--config", recipe(), "--model.objective.l1={weight: 2}", "--model.optimizer={lr: 2}").model
    assert (model.objective["l1"].init_args.weight, model.optimizer.init_args.lr) == (2, 2)


def test_an_option_is_over_a_recipe_wherever_it_stands(recipe):
    file = recipe()
    words = with_recipe_files(["--data.size", "64", "--config", file, "--fork"])
    assert words == [f"--config={file}", "--data.size=64", "--fork"]


def test_merging_follows_the_order_of_the_command_line(recipe):
    config = merge(
        ["--config", recipe(), "--data.size", "64", "--trainer.callbacks+=Timer", "--trainer.callbacks.interval=step"]
    )
    assert config["data"] == {"path": "photos", "size": "64"}
    assert config["trainer"]["callbacks"][1] == {"class_path": "Timer", "init_args": {"interval": "step"}}
    assert merge(["--fork", "--run_dir=x"]) == {"fork": True, "run_dir": "x"}


def test_a_mapping_in_one_option_replaces_the_recipe_s(tmp_path):
    with quiet_libraries():
        cli = CommandLine(["--config", "sd-vae-f8c4", "--model.autoencoder", "{pretrained: somewhere}"])
        assert dict(cli.config.model.autoencoder) == {"pretrained": "somewhere"}
        with pytest.raises(RequestError) as caught:
            CommandLine(["--config", "sd-vae-f8c4", "--model.autoencoder", "somewhere-else-entirely"])
    assert len(str(caught.value)) < 1500


def test_null_leaves_a_term_or_the_adversary_out(recipe, tmp_path):
    over = tmp_path / "over.yaml"
    over.write_text("model: {objective: {l1: null, kl: {class_path: KL}}}")
    model = parse("--config", recipe(model__objective__l2={"class_path": "L2"}), "--model.objective.l1", "null").model
    assert list(model.objective) == ["l2"]
    assert model.adversary is not None
    assert parse("--config", recipe(), "--model.adversary=null").model.adversary is None
    assert list(parse("--config", recipe(), "--config", str(over)).model.objective) == ["kl"]
    with pytest.raises(RequestError, match=r"^model\.objective has no term left"):
        parse("--config", recipe(), "--model.objective.l1=null")
