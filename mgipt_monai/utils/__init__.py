# SPDX-License-Identifier: Apache-2.0
"""Helpers that do not depend on the methods: files, messages, fingerprints, weights."""
