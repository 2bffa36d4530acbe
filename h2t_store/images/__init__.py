"""What to read: a source gives pictures by row, their labels, and identifiers that stay the same on every run.

Accepted as ``data`` are

- a folder: the folder that an image lies in is its class, by its path; a folder of images alone is unlabelled;
- a ``.tar`` of class folders, read without unpacking it;
- a list file: ``path label`` on each line, or only paths;
- ``torch/NAME``: cifar10, cifar100, mnist, kmnist, fashion_mnist, qmnist, imagenet, inaturalist or places365;
- ``hfds/NAME``: a Hugging Face dataset, by its folder or its name on the Hub;
- ``wds/FOLDER``: shards of WebDataset;
- ``digits``: scikit-learn's;
- in Python ``(images, labels)``: uint8 images (n, h, w, 3) or a list of images of PIL, and n labels, which are integers
  from 0 (-1 where unlabelled) or strings, or None;
- in Python any map-style dataset, an object with ``len()`` and ``[i]`` that gives (image of PIL or uint8 array, label):
  those of torchvision, a ``datasets.Dataset``, ``Subset`` and ``ConcatDataset`` of torch, and own classes. It comes
  without a transform that gives tensors. Labels are integers, which ``classes`` names if it is there, strings, or None.
  All items are read once for their labels, unless an attribute ``targets`` lists them.
"""

from h2t_store.images.formats import IMAGE_EXTENSIONS
from h2t_store.images.opening import Data, open_source
from h2t_store.images.source import Source, arrange

__all__ = ["IMAGE_EXTENSIONS", "Data", "Source", "arrange", "open_source"]
