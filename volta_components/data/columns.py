# SPDX-License-Identifier: Apache-2.0
"""Names of columns in the tables that come with the data sets: ADNIMERGE, the image archive's search results, BIDS."""

from __future__ import annotations

ID_COLUMNS = (
    "participant_id",
    "subject_id",
    "PTID",
    "Subject",
    "Subject ID",
    "patient_id",
    "ID",
    "name",
    "file",
    "RID",
)
SEX_COLUMNS = ("sex", "PTGENDER", "gender", "M/F")
# The age at the scan counts first; the others may be of another day.
SCAN_AGE = "age_at_scan"
AGE_COLUMNS = (SCAN_AGE, "age", "age_bl")
DIAGNOSIS_COLUMNS = ("diagnosis", "DX_bl", "DX", "diagnosis_sc", "Research Group", "group", "label")
SITE_COLUMNS = ("site", "site_id", "acquisition_site", "institution", "scanner")
SESSION_COLUMNS = ("session_id", "session", "ses", "VISCODE", "visit", "visit_id", "timepoint", "wave")
DATE_COLUMNS = ("acq_time", "scan_date", "EXAMDATE", "examination_date", "Acq Date", "Study Date", "date", "MRI_date")
FACT_COLUMNS = {"sex": SEX_COLUMNS, "age": AGE_COLUMNS, "diagnosis": DIAGNOSIS_COLUMNS, "site": SITE_COLUMNS}
