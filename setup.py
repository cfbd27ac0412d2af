"""What pyproject.toml cannot say: this folder is a package, too; its data are what `rrlhf init` copies."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["rrlhf*"]), "rrlhf.project"],
    package_dir={"rrlhf.project": "."},
    script_name="setup.py",  # so that it is no module of that package
)
