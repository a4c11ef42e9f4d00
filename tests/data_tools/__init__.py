"""Tests of `data_tools`, one file per module."""
