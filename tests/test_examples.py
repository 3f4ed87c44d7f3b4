"""Run the examples in docstrings."""

import doctest
from importlib import import_module

import pytest


@pytest.mark.parametrize("module", ["decoding", "inputs", "metrics"])
def test_examples_in_docstrings(module):
    failed, tried = doctest.testmod(import_module(module))
    assert tried and not failed
