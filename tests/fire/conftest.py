import pytest
from hypothesis import HealthCheck, settings


def pytest_configure(config: pytest.Config) -> None:
    """Six properties: some hundreds of cases, the same each time; with --long more than 10,000 and ever others."""
    kept = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
    settings.register_profile("usual", max_examples=60, derandomize=True, **kept)
    settings.register_profile("long", max_examples=1700, print_blob=True, **kept)
    settings.load_profile("long" if config.getoption("--long") else "usual")
