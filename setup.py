import re
from pathlib import Path

from setuptools import setup

# A package index cannot show pictures with relative addresses.
readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
setup(long_description=re.sub(r"^!\[.*\n\n", "", readme, flags=re.M), long_description_content_type="text/markdown")
