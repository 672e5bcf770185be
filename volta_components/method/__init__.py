# SPDX-License-Identifier: Apache-2.0
"""The method of the paper, a module for each of its words.

- ``networks``: the ViT autoencoder with its summary, student and teacher; ``summariser``: the CLS-style summariser;
  ``projection``: the projection branch;
- ``views``: global and local crops; ``masking``: GMML;
- ``losses``: the DiCoM losses, eq. 1 to 6 (eq. 1 is in ``reconstruction``);
- ``ema``: the EMA handler, by which the teacher follows the student; ``trainer``: a mini-batch from views to optimiser;
- ``collapse``, ``monitoring``: what is watched during a run; ``export``, ``weights``: what is left of it;
- ``monai_versions``: state dicts of other versions of MONAI.
"""
