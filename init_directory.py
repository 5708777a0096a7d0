"""Make the folders data/, figures/ and results/, and fetch datasets:

python init_directory.py
python init_directory.py --download MNIST FashionMNIST CIFAR10

Downloads come from the published mirrors, are verified by checksum, continue where they stopped, and leave nothing
half-written. The scripts' default, mnist-mini, is part of the repository and needs no download.
"""

import argparse
from pathlib import Path

from common import ROOT, cli, data


def main():
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--download", nargs="+", default=[], choices=list(data.DOWNLOADS), help="datasets to fetch")
    parser.add_argument("--data-dir", type=Path, help="where datasets go (default: data/)")
    parser.add_argument("--output", type=Path, default=ROOT, help="where the folders go (default: the repository)")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    options = parser.parse_args()
    for folder in ("data", "figures", "results"):
        (options.output / folder).mkdir(parents=True, exist_ok=True)
    for name in options.download:
        folder = data.download(name, options.data_dir or options.output / "data", options.quiet)
        loaded = data.load(name, options.data_dir or options.output / "data")
        if not options.quiet:
            print(f"{loaded.label}: {len(loaded.x)} training and {len(loaded.x_test)} test images in {folder}")


if __name__ == "__main__":
    cli.guard(main)
