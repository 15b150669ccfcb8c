"""Curations: what makes a dataset between stages, or from the command line. Specs; models and Ray when they run."""

from bridgework.curation.capfilt import CapFilt as CapFilt
