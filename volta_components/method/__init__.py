# SPDX-License-Identifier: Apache-2.0
"""The method of the paper, a module for each of its words.

- ``networks``: the ViT autoencoder with its summary, student and teacher; ``summariser``: the CLS-style summariser;
  ``projection``: the projection branch;
- ``views``: global and local crops; ``masking``: GMML;
- ``losses``: the DiCoM losses, eq. 1 to 6 (eq. 1 is in ``reconstruction``); ``cross_entropy``: eq. 4-5, a few tokens at
  a time; ``koleo``: a loss that is not in the paper; ``air``: tokens that no loss looks at;
- ``ema``: the EMA handler, by which the teacher follows the student; ``trainer``: a mini-batch from views to optimiser;
  ``one_view``: global views one at a time; ``graphs``: a mini-batch as one CUDA graph;
- ``collapse``, ``monitoring``, ``statistics``: what is watched during a run;
- ``export``, ``weights``: what is left of a run;
- ``monai_versions``: state dicts of other versions of MONAI.
"""
