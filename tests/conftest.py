"""Its being here puts this folder on the import path: helpers of several test folders live beside it."""
