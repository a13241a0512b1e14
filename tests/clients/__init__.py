"""Real clients pull through a real upstream: nothing here is ours but the server between them."""

import pytest

pytest.register_assert_rewrite("tests.clients.site")
