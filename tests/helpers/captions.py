"""Pieces of captions of every kind, and open_clip's own tokenizer."""

from functools import cache

PIECES = (
    "<start_of_text> <END_OF_TEXT> <|x|> &amp; &amp;amp;lt; &lt;b&gt; &#x1F600; &#55357; &#0; "
    "&nope; "
    "😀 👩‍👩‍👧 🏳️‍🌈 é e\u0301 ﬁne ＬＯＵＤ İstanbul ΑΣ ſ K 's 'Ll 'ſ ½ ٣ Ⅷ 漢字 สวัสดี नमस्ते "
    "\x1b[31m \x00 \x7f \x85 \xa0 \u2028 \u200b \u3000 \ufeff \ufffd \ud83d \ude00 \t \r\n \x1c "
    "â€œ schÃ¶n Ã\xa0 â€™ “curly” ’ it's we've dog</w> aaaaaaa ##!!?? hello-world 2024 </w>"
)


@cache
def reference():
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()
