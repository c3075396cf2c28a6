"""Names, tags, groups and commands of runs in W&B, from their options."""

import shlex

import pytest
from omegaconf import OmegaConf

from experiments.recording.label import LONGEST_NAME, LONGEST_TAG, label_of

CHOICES = {"benchmark": "split_digits", "strategy": "ewc", "model": "mlp", "experiment": None}
CHOICES |= {"hydra/launcher": "basic", "fisher/structure": "diagonal"}


def test_five_strengths_are_five_names():
    labels = [label_of(CHOICES, [f"strategy.strength={s}"], 0) for s in (1, 3, 10, 30, 100)]
    assert len({label.name for label in labels}) == 5
    assert labels[2].name == "split_digits ewc strength=10 seed=0"
    assert labels[2].tags == ["split_digits", "ewc", "strength=10"]
    assert (labels[2].group, labels[2].job_type) == (None, "train")


def test_a_name_has_what_decides_the_results():
    given = ["strategy=ewc", "benchmark=split_digits", "seed=3", "wandb.mode=offline"]
    given += ["data_root=somewhere", "training.checkpoint_minutes=1", "experiment=recipe"]
    given += ["fisher/structure=kronecker", "+model.hidden=[4, 5]", "~training.anneal"]
    label = label_of(CHOICES | {"experiment": "recipe"}, given, 3)
    assert label.name == "split_digits ewc structure=kronecker hidden=[4, 5] anneal= seed=3"
    assert label.tags[:3] == ["split_digits", "ewc", "recipe"]


def test_options_with_the_same_last_word_are_told_apart():
    given = ["fisher.batch_size=5", "training.batch_size=6", "optimizer.lr=1"]
    name = "split_digits ewc fisher.batch_size=5 training.batch_size=6 lr=1 seed=0"
    assert label_of(CHOICES, given, 0).name == name


def test_what_wandb_would_refuse_is_cut_or_left_out():
    label = label_of(CHOICES, [f"model.hidden=[{'9, ' * 60}]", "optimizer.lr=1"], 0)
    assert len(label.name) == LONGEST_NAME
    assert label.name.endswith(" seed=0")
    assert label.tags == ["split_digits", "ewc", "lr=1"]
    assert max(map(len, label.tags)) <= LONGEST_TAG


def test_the_choices_are_words():
    choices = {"benchmark": "split_digits", "strategy": "ewc", "model": "mlp"}
    choices |= {"fisher/structure": "diagonal", "seed": 7}
    assert label_of(CHOICES, [], 7).choices == choices


@pytest.mark.parametrize(
    ("choices", "given", "group"),
    [
        ({}, ["strategy=naive,ewc", "seed=0,1", "optimizer.lr=0.1"], "strategy seed"),
        ({}, ["strategy.strength=choice(1,2)", "optimizer.lr=interval(0,1)"], "strength lr"),
        ({"experiment": "fig2a"}, ["experiment=fig2a", "seed=0,1"], "fig2a"),
        ({"sweep": "strength"}, ["sweep=strength"], "strength"),
    ],
)
def test_a_group_is_what_is_swept_and_when(tmp_path, choices, given, group):
    sweep = tmp_path / "multirun" / "2026-11-27" / "10-00-00-000001"
    sweep.mkdir(parents=True)
    OmegaConf.save({"hydra": {"overrides": {"task": given}}}, sweep / "multirun.yaml")
    label = label_of({**CHOICES, **choices}, ["seed=0"], 0, sweep)
    assert label.group == f"{group} 2026-11-27 10-00-00-000001"
    assert label.job_type == "sweep"
    job, whole = label.notes.splitlines()
    assert job == "python -m experiments.run seed=0"
    assert shlex.split(whole)[3:] == ["python", "-m", "experiments.run", "-m", *given]


def test_a_group_without_hydras_file_is_the_folder(tmp_path):
    assert label_of(CHOICES, [], 0, tmp_path / "my_sweep").group == "my_sweep"


def test_the_command_is_quoted():
    given = ["wandb.name='a b'", "model.hidden=[1,2]"]
    notes = label_of(CHOICES, given, 0).notes
    assert shlex.split(notes)[3:] == given
