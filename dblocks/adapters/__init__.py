"""What dblocks knows of other libraries' models; a library is imported when it is used."""
