"""Fixtures: a shallow real Janus with random weights, built once, copied for every test that attaches to it.

torch and transformers are imported where a fixture needs them: xdist's controller loads this file as well, and runs no test.
"""

# ruff: noqa: E402  (the Hub must be up before anything of Hugging Face is imported)
import gc
import os

gc.disable()  # until all is imported: none of it is garbage

from loopback_hub import start_for_session

HUB = start_for_session()  # before any Hugging Face import: no test may reach another Hub, the user's cache or their token
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are too small to share, and a fork keeps one thread
# On Intel's cores, MKL sums in another order where a weight lies elsewhere in memory, as one that was loaded from a file may
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
os.environ["HF_UPDATE_DOWNLOAD_COUNTS"] = "0"  # datasets counts on the network how often it loads a file

import pytest
from hypothesis import settings

# The same cases on every machine, so that CI fails for a change and not by chance; `pytest --hypothesis-profile=explore`
# draws new ones. No deadlines: CI machines stall now and then.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None)
settings.load_profile("repeatable")


def pytest_collection_finish():
    """What was imported stays: a trainer collects garbage as it ends, and would look through all of it each time."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def freeze_what_stays():
    """What a file's tests left behind stays as well: modules that were imported late, caches, models that files share."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture
def hub():
    """The Hub that all tests speak to, empty; ann may write to org."""
    from helpers import ANN

    HUB.reset()
    HUB.add_user("ann", ANN, "org")
    return HUB


@pytest.fixture(scope="session")
def processor():
    """The base's processor: 64 placeholders an image."""
    from tiny_world.tiny_janus import make_processor

    return make_processor()


@pytest.fixture(scope="session")
def short_processor():
    """The processor of a default adapter: 4 + 1 + 16 placeholders."""
    from helpers import SHORT
    from tiny_world.tiny_janus import make_processor

    return make_processor(SHORT)


@pytest.fixture(scope="session")
def pristine(processor):
    """The one base that `base` copies; nothing may attach to it."""
    import torch
    from shallow import shallow
    from tiny_world.tiny_janus import make_model

    torch.manual_seed(0)
    model = shallow(make_model(processor)).eval()
    with torch.no_grad():  # livelier than at its default start, where every prompt draws nearly the same
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2.5)
    return model


@pytest.fixture
def fresh(pristine):
    """Makes a base to attach to."""
    from copies import copier

    return copier(pristine)


@pytest.fixture
def base(fresh):
    """A base to attach to."""
    return fresh()


@pytest.fixture(scope="session")
def shared(pristine):
    """Gives adapters that no test may change, of the fields that it is told; each is made once."""
    from copies import copied
    from helpers import attach

    made = {}

    def sums(model) -> dict[str, float]:
        return {name: weight.double().sum().item() for name, weight in model.named_parameters()}

    def give(**fields):
        key = tuple(sorted(fields.items()))
        if key not in made:
            model = attach(copied(pristine), **fields)
            made[key] = model, sums(model)
        return made[key][0]

    yield give
    assert all(sums(model) == before for model, before in made.values())


@pytest.fixture(scope="session")
def base_folder(pristine, processor, tmp_path_factory):
    """The base and its processor as a repo folder."""
    folder = tmp_path_factory.mktemp("base")
    pristine.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def images():
    """Four scenes, PIL images."""
    from helpers import rng
    from tiny_world.digits import random_scene

    return [random_scene(rng(seed), "held-out").image("held-out") for seed in range(4)]


@pytest.fixture(scope="session")
def short_question(short_processor, images):
    """One image and a question, with the adapter's placeholders."""
    from helpers import question_inputs

    return question_inputs(short_processor, ["What digit is at the top left?"], images[:1])


@pytest.fixture(scope="session")
def dense_question(processor, images):
    """The same with the base's placeholders."""
    from helpers import question_inputs

    return question_inputs(processor, ["What digit is at the top left?"], images[:1])
