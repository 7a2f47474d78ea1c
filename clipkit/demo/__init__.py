"""The end-to-end demo on emoji drawings."""
