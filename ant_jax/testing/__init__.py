"""What it takes to test a callback of your own: a recorder of hooks, a tiny problem, and a checker of promises.

::

    from ant_jax import testing

    testing.check_callback(lambda: my_callback(0.5))
"""

from ant_jax.testing._check import CallbackFault as CallbackFault, check_callback as check_callback
from ant_jax.testing._problem import Problem as Problem, problem as problem
from ant_jax.testing._recorder import record_hooks as record_hooks
from ant_jax.testing._resume import ResumeFault as ResumeFault, check_resume as check_resume
