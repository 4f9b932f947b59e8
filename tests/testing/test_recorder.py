"""The recorder writes down every hook, in the order in which they run."""

from problems import batches, trainer

from ant_jax import HOOKS, testing


def test_it_records_all_hooks_in_their_order():
    recorder = testing.record_hooks()
    a_trainer = trainer(recorder)
    a_trainer.fit(a_trainer.init(batches()[0]), batches(2), 1, batches(1))
    step = ("on_batch_begin", "on_backward_end", "on_before_update", "on_before_apply", "on_batch_end")
    assert recorder.calls == [
        ("on_train_begin",),
        ("on_epoch_begin", 0),
        *((hook, 0) for hook in step),
        ("on_checkpoint",),
        *((hook, 1) for hook in step),
        ("on_evaluate_begin",),
        ("on_evaluate_end",),
        ("on_epoch_end", 0),
        ("on_checkpoint",),
        ("on_train_end",),
    ]
    assert {hook for hook, *_ in recorder.calls} == HOOKS.keys() - {"on_exception"}


def test_two_recorders_share_nothing():
    one, other = testing.record_hooks(), testing.record_hooks(name="other")
    tiny = testing.problem(one)
    tiny.trainer.fit(tiny.state, tiny.train_loader, 1)
    assert one.calls and not other.calls


def test_the_package_does_not_bring_it_along():
    import subprocess
    import sys

    code = "import sys, ant_jax; print('ant_jax.testing' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
