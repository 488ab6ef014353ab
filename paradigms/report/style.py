"""The frame of a page and its style: light and dark, narrow windows, paper; no script, nothing from elsewhere."""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>@title</title><style>
:root{--ink:#1d1d1f;--quiet:#63666b;--rule:#d9dbde;--faint:#eceef0;--page:#fff}
@media (prefers-color-scheme:dark){:root{--ink:#e4e4e6;--quiet:#a0a3a8;--rule:#46484c;--faint:#303236;--page:#1b1c1e}}
*{box-sizing:border-box}
body{font:16px/1.5 Charter,"Bitstream Charter","Source Serif 4",Cambria,"Liberation Serif",serif;color:var(--ink);
 background:var(--page);max-width:1080px;margin:2.5rem auto 4rem;padding:0 1.25rem}
h1,h2,h3{font-weight:600;line-height:1.25;overflow-wrap:anywhere}
h1{font-size:1.75rem;margin:0}h2{font-size:1.2rem;margin:2.4rem 0 .6rem}h3{font-size:1rem;margin:1.4rem 0 .2rem}
p{margin:.3rem 0 .6rem;color:var(--quiet);max-width:46rem;overflow-wrap:anywhere}header{margin-bottom:1.2rem}
.wide{overflow-x:auto}
table,.key,figcaption{font-family:system-ui,"Helvetica Neue",Arial,"Liberation Sans",sans-serif;font-size:.84rem}
table{border-collapse:collapse;border-top:1.5px solid var(--ink);border-bottom:1.5px solid var(--ink);
 font-variant-numeric:tabular-nums lining-nums}
th,td{text-align:left;padding:.3rem 1.6rem .3rem 0;border-top:1px solid var(--faint);vertical-align:baseline;
 font-weight:400;max-width:34rem}
tbody th{color:var(--quiet);white-space:nowrap}td,th{overflow-wrap:break-word}
thead th{font-weight:600;border:0;border-bottom:1px solid var(--rule);white-space:nowrap}
thead tr:empty{display:none}tbody tr:first-child>*{border-top:0}th:last-child,td:last-child{padding-right:0}
code{font:.95em ui-monospace,"SF Mono",Menlo,Consolas,"Liberation Mono",monospace;overflow-wrap:anywhere}
.numbers td{white-space:nowrap}.quiet{color:var(--quiet)}
.numbers .quiet{white-space:normal;display:inline-block;min-width:11rem;vertical-align:top}
div.wide+div.wide{margin-top:1rem}
.key{display:flex;flex-wrap:wrap;gap:.2rem 1.4rem;color:var(--ink);max-width:none}
.run{white-space:nowrap}.run i{display:inline-block;width:1.3rem;margin-right:.45rem;vertical-align:middle}
.row{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,320px),1fr));gap:1rem 1.2rem;align-items:start}
figure{margin:.4rem 0;min-width:0}figcaption{color:var(--quiet);margin-top:.25rem}
.panel figcaption{display:flex;flex-wrap:wrap;justify-content:space-between;gap:0 .8rem;margin:0 .3rem .1rem;
 color:var(--ink);overflow-wrap:anywhere}
img{display:block;width:100%;height:auto}
.grid .wide,.matrix .wide{width:fit-content;max-width:100%}
.matrix img{max-width:460px}.row:has(.matrix){grid-template-columns:repeat(auto-fill,minmax(min(100%,400px),1fr))}
.grid{margin-bottom:1.4rem}.grid img{width:auto;max-width:100%}
@media (max-width:600px){body{margin-top:1.2rem;padding:0 .9rem}.grid img{max-width:none}
 th,td{padding-right:.9rem}tbody th{white-space:normal}}
@media (prefers-color-scheme:dark){figure .wide{background:#fff;border-radius:4px;padding:.4rem}}
@media print{:root{--ink:#000;--quiet:#444;--rule:#999;--faint:#ccc;--page:#fff}body{margin:0;max-width:none;font-size:11pt}
 h2,h3{break-after:avoid}figure,tr{break-inside:avoid}.wide{overflow:visible}.row{grid-template-columns:1fr 1fr 1fr}
 *{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
</style></head><body>
@body
</body></html>
"""
