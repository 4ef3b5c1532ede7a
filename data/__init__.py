"""Tasks and data sets: apples, gsm8k, math and svamp by name, the user's own by path."""

from engine import tasks
from engine.common import Problem

OURS = ("apples", "gsm8k", "math", "svamp")


def load_task(name):
    """One of ours by its name, or the user's own by the path of its .py file."""
    if name == "apples":
        from data import apples as source
    elif name in OURS:
        from data import maths

        source = maths.task(name)
    elif name.endswith(".py"):
        source = tasks.import_file(name)
    else:
        raise Problem(f"--task {name}: it is none of {', '.join(OURS)} and no path of a .py file")
    return tasks.make_task(name, source)
