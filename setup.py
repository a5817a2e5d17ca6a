"""The C++ extension and the mapping kernels/ -> slap_fast.kernels; pyproject.toml has the rest."""

from glob import glob

from setuptools import find_packages, setup

try:
    from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
except ImportError:  # --no-build-isolation in an environment without it: the reference runs
    print(
        "slap-fast: pybind11 is missing, so slap_fast._C is not built; slap-fast doctor tells more"
    )
    extension = {}
else:

    class OptionalBuildExt(build_ext):
        """Says in one line what a failed build means; ``optional=True`` lets the install go on."""

        def build_extension(self, ext: Pybind11Extension) -> None:
            try:
                super().build_extension(ext)
            except Exception as error:
                print(f"slap-fast: {ext.name} is not built ({error}); slap-fast doctor tells more")
                raise

    ParallelCompile().install()
    extension = {
        "cmdclass": {"build_ext": OptionalBuildExt},
        "ext_modules": [
            Pybind11Extension(
                "slap_fast._C",
                sorted(glob("csrc/*.cpp")),
                depends=sorted(glob("csrc/*.h")),
                cxx_std=17,
                optional=True,
            )
        ],
    }

setup(
    packages=[*find_packages(include=["slap_fast", "slap_fast.*"]), "slap_fast.kernels"],
    package_dir={"slap_fast.kernels": "kernels"},
    **extension,
)
