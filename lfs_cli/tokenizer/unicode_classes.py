r"""Which characters are letters, marks, numbers and white space: one pinned version of Unicode.

Unicode gives new characters a class every year, and libraries follow at different times, so a tokenizer that asked
whatever is installed would change its ids with an update. This table is what the `regex` module 2026.11 answers
(Unicode 17), and all patterns of `split.py` use it:

    OTHER    anything else: punctuation, symbols, surrogates, characters without a meaning yet
    UPPER    [\p{Lu}\p{Lt}]    capitals, and pairs such as U+01C5 that are written as one
    LOWER    \p{Ll}
    LETTER   [\p{Lm}\p{Lo}]    letters of alphabets without capitals, such as Han, and modifiers
    MARK     \p{M}             accents and vowel signs that stand on a letter
    NUMBER   \p{N}
    SPACE    \s, the property White_Space: U+0085, U+00A0 and U+3000 are in, U+001C, U+200B and U+FEFF are not.
             (`str.isspace()` answers otherwise for U+001C to U+001F: it is not used here.)

Unicode 17 was chosen as the newest there is: the classes of characters that older versions knew are the same but for
a few, so it differs from them in characters that they could not name.

The table is kept as runs, `<length in hex><first letter of the class>`, such as `9O5S12O1S` for U+0000 to U+0020,
compressed; `L` is LOWER and `C` LETTER, without case. `pack_classes` makes the text; a test makes it again with the
installed `regex` and compares.
"""

import base64
import zlib
from bisect import bisect_right
from functools import cache
from itertools import accumulate, groupby
from re import findall

OTHER, UPPER, LOWER, LETTER, MARK, NUMBER, SPACE = range(7)

LETTERS = (UPPER, LOWER, LETTER)
"""The classes that make up \\p{L}."""

CODE_POINTS = 0x110000

_INITIALS = "OULCMNS"

_PACKED = (
    "c-q}rNpj>i5d0Dg8-X*f1aMIF1GxVG3C=8lt=5cZ9P-$jun$mk0f9oTnWfbHo0ukVS6l1cWPJquSyns|{z*;p+)R}wi)~UROS8P2AJQ=5A`RmqUp"
    "UM!zW=php4awy&0mXs-SfJ?Gv9q@UgqD=@ho#Sm+x=PFYBPsx!18@YM*<|<1AfP_uYHv7n9*^VzO&{KAVTD(ZMj_TvK^Y<ufjYH+JE5;C;if^jD9"
    "`i}Wy74^9JoPFUZ6+ienyC8mEy5p6DCsd)370^>_YGl2%rp_v4Kpy!yQz-$<13|rtH8{W7qN85^TX3OHsS}{3G308e<E~bTIGCy(nU8~LXFq!zL$"
    "eCrs6rb`|1m3w;BRLgrDV&IR60$3N2*1Seg{d^*+O;kFCJ`IWaB6(DW{H$fiVZqhurFj-vA@CEkZ9ub7Bi2fYx84DYH<>7*k$H?E)elV57g{fgP("
    "<JdJOehEl@+R%bDlUC7b6WIvM%B%v74@d@NU>sIuuYNw<-Y%lIKxRHbup?~6;TJS-kzy!-B0uM4~%%XfKR4n=7~U3DIhV^t1^U(-_seyt9RvE#TN"
    "C$ZhA{1#uH?WhNy$NLnj*Xg;tjQMl-pP`-m7_rSNML)*N3hRd>ye{JJMaB{6c01nPYBVXE4<EsK_@d0UpIcaDsVcq}o=%-9>5&Z-Xw~{*xPFAo!("
    "iC?Xm-Ln25WmvqiOJBek#lJH;$WCXVQI5e~~p==~8ex4FnzsI&`(~)CXOLix|gfa2j}?ae^lWW-m5r(D7hv4fMj|)a|W`W^sSyohD^i()>Y_IfCY"
    "an{APv>s?Y~n-K~9+T0I~{K?ykTDxaB#<ZnKu3DNL(d`4a2!Jyt?6e*}1lWNA+(s{|k!1*B&adE8hybA__jcUY!?mS;7&4j;MD0u)$S_&qEpo?94"
    "=IKYKpVS|;mQ<ohZ6U)@{?25zcoYeg(RVE)p+_CgTeZ|a>avgQTi@NWBfZQ7rfeFIe|HB-#$?~rmsVj8WuhA1eSs|BBn4<@R-_3npBw|p%GNmsmq"
    "RCnI_daG_OIj#a{V9B{o16KD(*>=S#_#jr6}bLwp1jT!v1>b^LJOVc7fN+jDuJ$>CYN7ysx?!j3zXHkNUqLx<TO@&Ep2dqep)ZwQ1pbCHltN<diS"
    "@C-ie8M}63Q5A0MG<kF=ZU>sP%@4GA52qp!j>5}zbE9d;E%+YaSfpM?MKwogcCYS4(LxHvDra>8!8P5`(0&7{+!JO&H`)F#yw@zMzJ6YfdZa~`nn"
    "3*`c~FN|b0$hZEHUS#`S@o8sgouJK7&o)wBT1sEmamYmQ-7bvwX+{7_f4!n$tU)YyKoG0xmEUU4X@W(p=giD%Dl>4t4LU;_y1{6OtAdj7N6J{7kt"
    "r9a(Dvk(0Rguj-LNv1uO9e;e4Nkg$FLn4vl(p5TYG?eF!P9DhznUS-dpmDrE*vpMcB$<Y0tc0Y-F>EB2Qa8Jd(EP<l}<3S??Ma@ScE!GgcuUhbNK"
    "}gzRD66yVz+8s4`#{wddYEH{J^?~I7V@0O?A3AL37EnC;sA?*-&%#6wxb5CB*iOYR1_Quj>#}IGAIh;q>uO5QxN5HQf-6MHa{)KDk8jhGTX`{VMD"
    "+SOp^(R4UCNdUJ}~8?9DU8Rb){B<e#X!4`L|t0t6-C7BMvlj){uI1u%iJSr~el8zGnd&}iC-k?f27dLrU@ArcZIu)fcQSC9-?Z=)5CibR}<cTAm$"
    "x1#CVwj&K~WP1pDvJlu3s7_EYOn}yKAf8ddD^V;`J@QC=n7BB;P}Q&^8P)_70kzch8!E@u`(ErhG%ENazt@sw`y{bUfI^%XX)1zvvOfq9Erd=n3H"
    "3U0(NLK22Wg8xpc)tUOO;8jpB<d2V!coYI25%FQZ8g;=9-v|&)NwJxd*ZKpecvKU%D`KHS2xV$CepVdBD!J!Yw9RZl&ldjm5_JF{A)<^-}{Dw=>G"
    ")102IHGpQytsF;$N6bB6~w>`&&<si_l<M4<YT5(bW=S%85kp6KX6qL*c@CUGrtz&OkM0|!eT+@nzXz=+W7RO0DYsXW}JMb9}2I3=0X=@-4b%-nS8"
    "0G3pmW@@EE`6;D?`i%{UDn#$PUJFG1rV;bllT+{p*>$HhA72Y*%!Sq$LpT%#~fF?5-%M0W~IJU128VCWK%jRw|}U5NX>eqp_4=^S5v^jB@a>qBp}"
    "vAJt_0nsr--q3{j4-)-_O0ZjaT-?@32=mMDMOSSXnbkg;TFkaTZn69sgNJO!)Ic}sNLs|1A6^e})x7C{(QVxzufI=KuZ#ke6Y`4R*ST|u+TGMCZm"
    "E3`Nm4#JGj=ug4{v!Y5%=U7ZFiCsaE5qM?sk=*Z6SxNOkNuttV4gRB!2p38ML#Ox72jWN@9lcegQVb6c_mqi^9DVJd3Q=mNnqe>KWN4Bf_LR)DXq"
    "49Ci-Rbnc;Dd=Qp<)sg|J07ogmj%_mL%Pno<j#<*f2jQmzZh{7P&d83&nH=$wrxx@g!ThNX`ye^jTtFFJ)}uV#W6h>N^y-$5G}o~<aj#s;K(C`;r"
    "@-GVdIV<Ku!i`mJ5ogUH7Yz5(D$XTOxfYl8NA-~uUxQ64Q{ncg*f3(SD_#QnFj_F<kKv3k8V!hTIY@^W|_nc5~0uM{EG<w;}LCx^mgP0)Zsl^m@c"
    "47|MwYd{uvDkg+WK#vjOWRaYy$<oBb5DBl&OgBHl4{hd!+!JnV8#}+jC)Pzrgt7NNDw0EfG8c{)NRZ(N+00sqX;}7!BrleZH&jyoqqWD;QEQPQK1"
    "{a^k=WNA#PCtCM52ejRK>wbJBo8^Dtr;c^ms>>$M^O-Un8=6+VR;Y2bOWfmUXhNTl0fgbJwJsZgNI!_nYFT1~Y>;zT`}OpU?BoC|&>{qpE8tlgsB"
    "cL&#e&6b#gA4VwznAEM@6B9_=Nf%N@PC+=rd}h%!!bS(Oo!x5xhn1^NQ3JWbZhDt<yFGLy-E}P8GgG*GJI`Uing8v$-`(EtUe?p(KDvAzLt&<K?W"
    "pU?kaTeNHJnOgL{tG1q9(CJA&mhpODlU`XZ9yMgih0hpuVOpGDQJ>t&`iQc9CA4NGX2+^m!nG"
)


@cache
def class_runs() -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return where each run of equal classes starts, and its class, both in the order of code points."""
    runs = findall(r"([0-9a-f]+)([A-Z])", zlib.decompress(base64.b85decode(_PACKED)).decode())
    starts = accumulate((int(length, 16) for length, _ in runs[:-1]), initial=0)
    return tuple(starts), tuple(_INITIALS.index(initial) for _, initial in runs)


def class_of(code: int) -> int:
    """Return the class of the character with the code point ``code``.

    >>> class_of(ord("é")) == LOWER
    True
    """
    starts, classes = class_runs()
    return classes[bisect_right(starts, code) - 1]


def pack_classes(classes: bytes) -> str:
    """Return the text of the table for the classes of all code points, one byte each."""
    runs = "".join(f"{len(list(run)):x}{_INITIALS[kind]}" for kind, run in groupby(classes))
    return base64.b85encode(zlib.compress(runs.encode(), 9)).decode()
