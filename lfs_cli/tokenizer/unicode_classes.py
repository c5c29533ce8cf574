r"""Which characters are letters, numbers and white space: one pinned version of Unicode.

The pattern of GPT-2 knows four classes of characters. Unicode gives new characters a class every year, and libraries
follow at different times, so a tokenizer that asked whatever is installed would change its ids with an update. This
table is what the `regex` module 2026.11.15 answers (Unicode 17):

    OTHER    anything else: punctuation, symbols, marks, surrogates, characters without a meaning yet
    LETTER   \p{L}
    NUMBER   \p{N}
    SPACE    \s, the property White_Space: U+0085, U+00A0 and U+3000 are in, U+001C, U+200B and U+FEFF are not.
             (`str.isspace()` answers otherwise for U+001C to U+001F: it is not used here.)

The table is kept as runs, `<length in hex><first letter of the class>`, such as `9O5S12O1S` for U+0000 to U+0020,
compressed. `pack_classes` makes the text; a test makes it again with the installed `regex` and compares.
"""

import base64
import zlib
from bisect import bisect_right
from functools import cache
from itertools import accumulate, groupby
from re import findall

OTHER, LETTER, NUMBER, SPACE = range(4)

CODE_POINTS = 0x110000

_INITIALS = "OLNS"

_PACKED = (
    "c-oCuS+=Y;4BQfy2k;&^_QzcTX4wA{QdKhj`X)I!`Dhx9t+7-"
    "RwdbE;J^VcVXloD0UU)gM5_qXS>}$6c@E?0<VGlj>X~j)=csY+f^>e>_#!kKu`xfvJy6x7J7K&a(-Q&l_%%^SaTR#f-"
    ">Vl0{amw}tZ3BYSZdbRlhYSM~UW8s;&VvV-wjV9x1mrF*{NBUWbKM6XZyd6)R|>>q?xE<Wx;uM-"
    "#T8NpUu`(OQj8sYJbEm?#S{WMdC>6%H=9f}O4AWZOTL{}T(UFj2=|pnAzP>NU+3)4@0p=md4{1{dVOQ|y*>Z2>XBPVqc`K9Mt$wRzYJ17+EB3QA~n!"
    "<o7pklb3G!hL8;6AYEZeo2Fd5eWgl8H&l==!eU*;%d;9Tijh}F9pf`M6RrY5TvsTtdvjag_m?fH~R8`q)bd}(Rkhn<fiKWUYt{<O>MjZ;%5)%Z>U-"
    ")i9O%Qqj(00mtLrw;P9fd(c=V(QF^mIpokQQFhE9rPIFbi&s$`Ir)h1n)t{NCz&6aM8bt1G@cQUsV`S7h7~o?M74>MtilhC`@Ws7!;oYa5HvfW)AKh"
    "RdZGKRrTTRDx(f?M3v8ZZeA@(;%B3q(U-"
    "yb|WrPTMXIgcJegIVl>N4aP1N2#uRt)EUMsPZZ~PM%F?`4us9CbFt{h)5NcSXm#jm?i}=U>B!oI5Y0HV)LxzI8ZVa>EyqW#{9*W3c#VI7INKM(hUUX"
    "q?{D3g*2X6e>L*iRRbS&GfglC4g*bJEoKopuMuZ2(2LLcJ1jCaX7FM<Jbv#a!YwuDrG3|5@GTPkP2DZ{G|@oDxOI&pJKT|C0;bm-rIS>U~J{Si;LP<"
    "w5jP8yMjnIf<AA#1Z^Gv5qMLqbr|3-"
    "N_IV6yv$qI;U2kpHIzhQE3ma@j7jv=I|wxppCwe1|e&;ulW?0mRcR?6ML+s%L`o?Fq>_;zGa=q7(dJ4vnz&$-"
    "*jSES!WR97eP*(*MJaUX@w3jdVGWgjK>f(M;hXFW6`^eI_v5o4$>pL;iT|>@T#+SKJk?d(!M0VX%sQ9Er8RLQzE4!UFdSx0PeJf|DoI<PY^+FCTsJK"
    "WmsgKS=CpVaA|*1OKi`n>Xl>zgqNQvBobuRWzb(z78yW7tSoe9GE;{ie2EgSjm^xp2RRl+Rc0oc35PW9R*1Ni3EV(L;><UO;!h>k6yW?2yodi8@gO%"
    "IEEDeX+*!Dqi+h4unv^J?aFmv^JS2MurhN)wwN4X46_lJ{6n94pszNf*1bjHfy>a}(kD<zK_m!_&|FwzcVq8NZ+E(&9`RUtr%4A9A?U>_Cxk%c!h{@"
    "M)C27iituLy+1gNf3Aq4phzVR)c6>TG$@Qd{063Yn$;HB;(8b{G-OXqm67V=sj_5m(ZzvPApT^chAd%FVjOHCzqsFDaRW&(O=Hbz(q-"
    "a5&MTPEUd%WQ_Ioctg*ifV<@O)6;f4+K<r|g(@#`^p3F~g)Mv%?>=JBN3+3#wUPbw8XaNv}~e!6N4H0TRncp;om4OY?1z^~R!OYm>``UXTPdB!XjM)"
    "u==bY6rE1(czTUVRj1hVc?n8a7IkU{aQa$<fIiMdi4p2x<PhfdWwuQYx~IT-j57nv$pK(5Pz|A-"
    "21xxne~cGs@=zkxyr=6&ZxDj(D(Z$tldtshD}z?#pR<42TB=e0?RB=HrhGMs@0|TBA7FB>Z7$kRSh=5oMWgT2UYM1wUGeQL{BTyd*geeW)4Sm@cB-"
    "ZhQy792qZT_3d6mUJv7EuW;$uM-jl%v6t&Hm18LlMUW3_%XZdkTjg_-XBqY$5(-"
    "+7BNL>)Rx=;M`lVd}9fpZHL(Gpbx?9Hsbd=?+)a6!KfwQXpLq|~(TZxPw&Q{|l4=ezU{V%s}NoU<zO>>yf{uuwmj=l|UiZ_(PifN1D3+Ebz1;Ieq{)"
    "fm;IucBCu5-"
    "H4NOoRlC6v1z=;{41$cxG4fvcFoczJPAWVfwTMxXb=0{!B?Yr?kk<IhudyrIyq)I0&5cb8fr|ne~0VJ^b^nmwwGf@o)S8{(IlO$xdJL#3S#wK=ubq7"
    "~tA*6Le`omdmY~B?J#|*%XW`>JtgAxE>s_?>*mGjzXjbuy7q43l6BgmUu4xFXYekH2"
)


@cache
def class_runs() -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return where each run of equal classes starts, and its class, both in the order of code points."""
    runs = findall(r"([0-9a-f]+)([A-Z])", zlib.decompress(base64.b85decode(_PACKED)).decode())
    starts = accumulate((int(length, 16) for length, _ in runs[:-1]), initial=0)
    return tuple(starts), tuple(_INITIALS.index(initial) for _, initial in runs)


def class_of(code: int) -> int:
    """Return the class of the character with the code point ``code``.

    >>> class_of(ord("é")) == LETTER
    True
    """
    starts, classes = class_runs()
    return classes[bisect_right(starts, code) - 1]


def pack_classes(classes: bytes) -> str:
    """Return the text of the table for the classes of all code points, one byte each."""
    runs = "".join(f"{len(list(run)):x}{_INITIALS[kind]}" for kind, run in groupby(classes))
    return base64.b85encode(zlib.compress(runs.encode(), 9)).decode()
