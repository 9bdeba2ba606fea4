# SPDX-License-Identifier: Apache-2.0
"""Helpers that know nothing of methods: files, messages, fingerprints, weights."""
