import asyncio
import threading

import numpy as np
import onnxruntime
import pytest
from served import Gated

from offramp.errors import LinkTimeoutError, PayloadError, ServerBusyError
from offramp.serving.batching import Batcher, ModelFailedError
from offramp.serving.metrics import Metrics


def rows(*values):
    return [np.array([[value] for value in values], np.float32)]


def run(scenario, model=None, **settings):
    """Run ``scenario(batcher, model)`` on a batcher whose first batch is held at the gate."""
    model = model or Gated()
    limits = {"max_batch_rows": 8, "max_queue_rows": 16, "max_delay_ms": 0} | settings

    async def main():
        batcher = Batcher(model, Metrics(), **limits)
        try:
            return await scenario(batcher, model)
        finally:
            model.gate.set()
            await batcher.close(5)

    return asyncio.run(main())


async def ask(batcher, *values, deadline_ms=None):
    """Start a request and let it come as far as it gets."""
    task = asyncio.create_task(batcher.answer(rows(*values), deadline_ms))
    await asyncio.sleep(0)
    return task


async def busy(batcher, model):
    """A request that is being computed, so that others gather behind it."""
    task = await ask(batcher, 0.0)
    await asyncio.to_thread(model.started.acquire)
    return task


def test_what_waits_shares_a_batch_and_is_split_again():
    async def scenario(batcher, model):
        first = await busy(batcher, model)
        tasks = [await ask(batcher, 1.0), await ask(batcher, 2.0, 3.0), await ask(batcher, 4.0)]
        model.gate.set()
        found = [(await task)["y"][:, 0].tolist() for task in (first, *tasks)]
        assert found == [[0], [2], [4, 6], [8]]
        assert model.batches == [[0], [1, 2, 3, 4]]

    run(scenario)


def test_a_lone_request_does_not_wait():
    async def scenario(batcher, model):
        model.gate.set()
        start = asyncio.get_running_loop().time()
        await batcher.answer(rows(1.0))
        assert asyncio.get_running_loop().time() - start < 5

    run(scenario, max_delay_ms=60_000)


def test_after_a_shared_batch_the_next_waits_for_as_many():
    async def scenario(batcher, model):
        await busy(batcher, model)
        tasks = [await ask(batcher, 1.0), await ask(batcher, 2.0)]
        model.gate.set()
        await asyncio.gather(*tasks)
        third = await ask(batcher, 3.0)
        await asyncio.sleep(0.05)
        assert len(model.batches) == 2
        await asyncio.gather(third, await ask(batcher, 4.0))
        assert model.batches[2:] == [[3, 4]]

    run(scenario, max_delay_ms=60_000)


def test_batches_keep_to_the_most_rows_and_to_one_shape():
    async def scenario(batcher, model):
        first = await busy(batcher, model)
        wide = asyncio.create_task(batcher.answer([np.full((1, 2), 9, np.float32)]))
        tasks = [await ask(batcher, *range(1, 6)), await ask(batcher, *range(6, 11))]
        tasks.append(await ask(batcher, 11.0))
        model.gate.set()
        await asyncio.gather(first, wide, *tasks)
        assert model.batches == [[0], [9], [1, 2, 3, 4, 5, 11], [6, 7, 8, 9, 10]]

    run(scenario)


def test_a_full_queue_refuses_and_recovers():
    async def scenario(batcher, model):
        first = await busy(batcher, model)
        tasks = [await ask(batcher, 1.0, 2.0), await ask(batcher, 3.0)]
        with pytest.raises(ServerBusyError, match="3 samples wait already, of 3"):
            await batcher.answer(rows(4.0))
        model.gate.set()
        await asyncio.gather(first, *tasks)
        assert (await batcher.answer(rows(5.0)))["y"].tolist() == [[10]]

    run(scenario, max_queue_rows=3)


def test_more_samples_than_a_batch_may_have():
    async def scenario(batcher, _):
        with pytest.raises(PayloadError, match=r"at most 8 samples\. Got 9"):
            await batcher.answer(rows(*range(9)))

    run(scenario)


def test_what_waited_too_long_is_never_computed():
    async def scenario(batcher, model):
        first = await busy(batcher, model)
        late = await ask(batcher, 1.0, deadline_ms=10)
        in_time = await ask(batcher, 2.0, deadline_ms=60_000)
        with pytest.raises(LinkTimeoutError, match="deadline_ms of 10 and was not computed"):
            await late
        model.gate.set()
        await asyncio.gather(first, in_time)
        assert model.batches == [[0], [2]]

    run(scenario)


def test_what_started_in_time_is_answered_late():
    async def scenario(batcher, model):
        first = await ask(batcher, 1.0, deadline_ms=10)
        await asyncio.to_thread(model.started.acquire)
        await asyncio.sleep(0.05)
        model.gate.set()
        assert (await first)["y"].tolist() == [[2]]

    run(scenario)


def test_a_client_that_goes_leaves_the_queue():
    async def scenario(batcher, model):
        first = await busy(batcher, model)
        gone, stays = await ask(batcher, 1.0, 2.0), await ask(batcher, 3.0)
        gone.cancel()
        await asyncio.sleep(0)
        model.gate.set()
        await asyncio.gather(first, stays)
        assert gone.cancelled()
        assert model.batches == [[0], [3]]

    run(scenario)


def test_a_client_that_goes_while_it_is_computed_harms_nobody():
    async def scenario(batcher, model):
        first = await busy(batcher, model)
        second = await ask(batcher, 1.0)
        first.cancel()
        model.gate.set()
        assert (await second)["y"].tolist() == [[2]]

    run(scenario)


def test_neighbours_of_a_request_that_fails_are_answered():
    async def scenario(batcher, model):
        first = await busy(batcher, model)
        tasks = [await ask(batcher, 1.0), await ask(batcher, -1.0), await ask(batcher, 2.0)]
        model.gate.set()
        found = await asyncio.gather(first, *tasks, return_exceptions=True)
        assert [found[k]["y"].tolist() for k in (0, 1, 3)] == [[[0]], [[2]], [[4]]]
        assert isinstance(found[2], ModelFailedError)
        assert model.batches[1:] == [[1, -1, 2], [1], [-1], [2]]

    run(scenario)


class Words(Gated):
    """Looks numbers up in a vocabulary of three."""

    def __init__(self):
        super().__init__()
        from onnx import TensorProto, helper

        table = helper.make_tensor("table", TensorProto.FLOAT, [3], [0.5, 1.5, 2.5])
        graph = helper.make_graph(
            [helper.make_node("Gather", ["table", "x"], ["y"])],
            "words",
            [helper.make_tensor_value_info("x", TensorProto.INT64, [None, None])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            initializer=[table],
        )
        opset = helper.make_opsetid("", 17)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=8)
        self.session = onnxruntime.InferenceSession(model.SerializeToString())

    def run(self, arrays, *, deadline_ms=None):
        return {"y": self.session.run(None, {"x": arrays[0].astype(np.int64)})[0]}


def test_what_the_engine_refuses_is_the_fault_of_the_request():
    async def scenario(batcher, model):
        good, bad = await ask(batcher, 1.0), await ask(batcher, 40_000.0)
        assert (await good)["y"].tolist() == [[1.5]]
        with pytest.raises(PayloadError, match=r"gated cannot take these values: indices .*40000"):
            await bad

    run(scenario, Words())


def test_an_answer_of_another_length_is_a_failure():
    class Short(Gated):
        def run(self, arrays, *, deadline_ms=None):
            return {"y": arrays[0][:-1]}

    async def scenario(batcher, _):
        with pytest.raises(ModelFailedError, match="ValueError in the model gated"):
            await batcher.answer(rows(1.0))

    run(scenario, Short())


def test_closing_answers_what_waits_and_refuses_what_comes():
    async def scenario(batcher, model):
        first, second = await busy(batcher, model), await ask(batcher, 1.0)
        closing = asyncio.create_task(batcher.close(30))
        await asyncio.sleep(0)
        with pytest.raises(ServerBusyError, match="shutting down"):
            await batcher.answer(rows(2.0))
        model.gate.set()
        await closing
        assert [(await task)["y"].tolist() for task in (first, second)] == [[[0]], [[2]]]

    run(scenario)


def test_what_waits_beyond_the_grace_is_refused():
    async def scenario(batcher, model):
        await busy(batcher, model)
        second = await ask(batcher, 1.0)
        threading.Timer(1.0, model.gate.set).start()
        await batcher.close(0.05)
        with pytest.raises(ServerBusyError, match="shutting down"):
            await second

    run(scenario)


def test_the_model_is_told_the_least_time_that_is_left():
    async def scenario(batcher, model):
        model.gate.set()
        await batcher.answer(rows(1.0))
        assert model.deadline_ms is None
        await batcher.answer(rows(1.0), 5000)
        assert 0 < model.deadline_ms <= 5000

    run(scenario)
