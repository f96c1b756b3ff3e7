"""Mistakes that are easy to make are named, with the way out."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import eventtrain as et
from tests.support.models import batches, examples, make_trainer

WHOLE = tuple(examples(8)[name] for name in ("x", "y"))


@pytest.mark.parametrize("whole", [WHOLE, tuple(map(jax.numpy.asarray, WHOLE))], ids=["numpy", "jax"])
def test_a_tuple_of_whole_arrays_is_no_list_of_batches(tmp_path, whole):
    trainer = make_trainer(tmp_path)
    shapes = r"2 arrays of the shapes \(8, 3\), \(8,\)"
    with pytest.raises(et.DataError, match=f"The data of epoch 0 is a tuple of {shapes}.*ArrayLoader"):
        trainer.fit(whole, epochs=1)
    with pytest.raises(et.DataError, match=f"The evaluation data is a tuple of {shapes}"):
        trainer.fit(batches(1), epochs=1, eval_data=whole)
    with pytest.raises(et.DataError, match=f"The evaluation data is a tuple of {shapes}"):
        trainer.evaluate(whole)
    with pytest.raises(et.DataError, match=f"The data to predict on is a tuple of {shapes}"):
        trainer.predict(whole)


def test_a_tuple_of_batches_that_differ_in_their_rows_is_data():
    state = {"w": jax.numpy.zeros(())}
    trainer = et.Trainer(lambda state, batch: (state, {"loss": batch.sum()}), state)
    assert trainer.fit((np.ones((2, 3)), np.ones((1, 3))), epochs=1).step == 2


def test_evaluation_data_that_is_used_up_is_called_so(tmp_path):
    trainer = make_trainer(tmp_path)
    used_up = iter(batches(1))
    with pytest.raises(et.DataError, match=r"The evaluation data is empty.*can be iterated only once"):
        trainer.fit(batches(1), epochs=2, eval_data=used_up)
    with pytest.raises(et.DataError, match="The evaluation data is empty"):
        trainer.evaluate([])
    with pytest.raises(et.DataError, match="The data to predict on is empty"):
        trainer.predict([])


def test_training_without_compilation_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    with jax.disable_jit(), pytest.raises(et.ConfigurationError, match=r"jax\.debug\.print"):
        trainer.fit(batches(1), epochs=1)
    assert trainer.fit(batches(1), epochs=1).step == 1
