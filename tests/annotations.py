"""Checks the type annotations of `src` at run time, with jaxtyping and beartype.

jaxtyping checks every call, which takes longer than a tiny model. Here a call is not checked again if one with
arguments and a result of the same types, dtypes and shapes has passed, for annotations depend on nothing else."""

import functools
import inspect
import threading
import types

import jaxtyping
import numpy as np
import torch
from beartype import BeartypeConf, beartype

typechecker = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is accepted as a float, as in temperature=0
check_every_call = jaxtyping.jaxtyped


def install():
    """Check the annotations of all modules of `src` that are imported from now on."""
    jaxtyping.install_import_hook("src", f"{__name__}.typechecker")
    jaxtyping.jaxtyped = lambda typechecker: functools.partial(check_new_kinds, typechecker)  # the hook looks it up


def check_new_kinds(typechecker, function):
    """Returns the function, or class, with checks of its arguments and results."""
    if not isinstance(function, types.FunctionType):
        return check_every_call(function, typechecker=typechecker)
    if not function.__annotations__:
        return function
    passed = set()  # kinds of arguments, and (kinds of arguments, kind of result)
    results = {}  # {thread: a result to check in place of calling the function again}

    def result_or_call(*args, **kwargs):
        thread = threading.get_ident()
        return results.pop(thread) if thread in results else function(*args, **kwargs)

    @functools.cache  # at the first call, when the names in annotations that are strings are defined
    def checked():
        functools.update_wrapper(result_or_call, function)
        result_or_call.__signature__ = inspect.signature(function, eval_str=True)
        return check_every_call(result_or_call, typechecker=typechecker)

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        if jaxtyping.config.jaxtyping_disable:
            return function(*args, **kwargs)
        before = kinds(args), kinds(kwargs.items())
        if None in before:
            return checked()(*args, **kwargs)
        is_new = before not in passed
        result = checked()(*args, **kwargs) if is_new else function(*args, **kwargs)
        call = before, kind_of(result)
        if not is_new and (call[1] is None or call not in passed):
            results[threading.get_ident()] = result
            try:
                checked()(*args, **kwargs)
            finally:
                results.pop(threading.get_ident(), None)
        passed.update((before, call))
        return result

    return wrapper


def kinds(values):
    """Returns a tuple with the kind of each value, or None if one has no kind."""
    found = tuple([kind_of(value) for value in values])
    return None if None in found else found


def kind_of(value):
    """Returns all that an annotation sees of a value, or None for a container: an annotation sees its items too."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return type(value), value.dtype, value.shape
    if isinstance(value, tuple):
        items = kinds(value)
        return None if items is None else (type(value), items)
    if isinstance(value, (str, type)):  # Literal["a"], type[A]
        return value
    return None if isinstance(value, (list, dict, set, frozenset)) else type(value)
