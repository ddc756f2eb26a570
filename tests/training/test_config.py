import dataclasses
import json

import pytest

from crossattention.training.config import FREE_ON_RESUME, TrainConfig


@pytest.mark.parametrize(
    ("fields", "came"),
    [
        ({}, "none of them"),
        ({"minutes": 5, "steps": 100}, "minutes=5 and steps=100"),
        ({"steps": 3, "epochs": 0.5}, "steps=3 and epochs=0.5"),
    ],
)
def test_exactly_one_length_is_given(fields, came):
    with pytest.raises(ValueError, match=f"exactly one of minutes, steps and epochs; got {came}"):
        TrainConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "steps must be a whole number of at least 1; got 0"),
        ({"steps": 2.5}, "steps must be a whole number of at least 1; got 2.5"),
        ({"steps": True}, "steps must be a whole number of at least 1; got True"),
        ({"minutes": 0}, "minutes must be a finite number above 0; got 0"),
        ({"minutes": float("nan")}, "minutes must be a finite number above 0; got nan"),
        ({"epochs": -1}, "epochs must be a finite number above 0; got -1"),
        ({"steps": 1, "learning_rate": 0.0}, "learning_rate must be a finite number above 0; got 0.0"),
        ({"steps": 1, "learning_rate": "fast"}, "learning_rate must be a finite number above 0; got 'fast'"),
        ({"steps": 1, "weight_decay": -0.1}, "weight_decay must be a finite number of at least 0; got -0.1"),
        ({"steps": 1, "warmup_steps": -1}, "warmup_steps must be a whole number of at least 0; got -1"),
        ({"steps": 1, "clip_norm": 0}, "clip_norm must be a finite number above 0; got 0"),
        ({"steps": 1, "betas": (0.9, 1.0)}, r"betas must be two numbers .*; got \(0.9, 1.0\)"),
        ({"steps": 1, "betas": (0.9,)}, r"betas must be two numbers .*; got \(0.9,\)"),
        ({"steps": 1, "seed": -3}, "seed must be a whole number of at least 0; got -3"),
        ({"steps": 1, "keep_checkpoints": 0}, "keep_checkpoints must be a whole number of at least 1; got 0"),
        ({"steps": 1, "threads": 0}, "threads must be a whole number of at least 1; got 0"),
        ({"steps": 1, "schedule": "cosin"}, "schedule must be one of cosine, .*, constant; got 'cosin'"),
        ({"steps": 1, "precision": "fp16"}, "precision must be one of fp32, bf16; got 'fp16'"),
        ({"steps": 1, "optimizer": "sgd"}, "optimizer must be one of adamw, muon; got 'sgd'"),
        ({"steps": 1, "device": "tpu"}, "device must be one of auto, cpu; got 'tpu'"),
    ],
)
def test_values_out_of_range_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**fields)


def test_it_goes_through_json_and_back():
    config = TrainConfig(minutes=2.5, clip_norm=None, betas=(0.8, 0.95), threads=2)
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_settings_of_another_version_are_named():
    with pytest.raises(ValueError, match=r"unknown training settings \['momentum'\]"):
        TrainConfig.from_json({"steps": 1, "momentum": 0.9})


def test_what_is_free_on_resume_exists():
    assert FREE_ON_RESUME <= {field.name for field in dataclasses.fields(TrainConfig)}
