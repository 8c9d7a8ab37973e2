"""Style and script of the demo's page. Nothing is loaded from other servers."""

CSS = """
.gradio-container {max-width: 1280px !important; margin: 0 auto !important}
/* Gradio's grey is too pale to read, on either background. */
.gradio-container {--body-text-color-subdued:
    color-mix(in srgb, var(--body-text-color) 70%, transparent);
  --block-info-text-color: var(--body-text-color-subdued)}
.gradio-container h1 {margin: 0 0 2px 0}
.gradio-container .html-container {padding: 0 !important}
footer {display: none !important}
/* Side by side on a wide screen; on a phone results follow Generate. */
#main {display: grid; gap: 16px; grid-template-columns: minmax(0, 1fr);
  grid-template-areas: "ask" "results" "settings"}
#main > * {min-width: 0 !important; width: 100%}
#ask {grid-area: ask} #results {grid-area: results}
#settings {grid-area: settings}
@media (min-width: 800px) {
  #main {grid-template-columns: 380px minmax(0, 1fr);
    grid-template-rows: auto 1fr;
    grid-template-areas: "ask results" "settings results"}
}
/* Gradio's own words, such as "Error", which would stay; #status says it. */
#results [data-testid="status-tracker"] {display: none !important}
#examples {flex-flow: row wrap !important; gap: 5px}
#examples > div {flex: 1 0 100% !important; width: 100%; min-height: 0}
#examples button {flex: 0 1 auto !important; width: auto; min-width: 0;
  white-space: normal; text-align: left; font-weight: normal;
  padding: 2px 8px; line-height: 1.4}
.mdm-bar {height: 4px; border-radius: 2px; margin-top: 6px;
  background: var(--border-color-primary)}
.mdm-bar div {height: 100%; border-radius: 2px;
  background: var(--color-accent)}
.mdm-error {color: var(--error-text-color, #b91c1c)}
.mdm-about, .mdm-small {color: var(--body-text-color-subdued);
  font-size: var(--text-sm)}
.mdm-facts, .mdm-facts tr, .mdm-facts th, .mdm-facts td {
  border: none !important; vertical-align: top}
.mdm-facts th {text-align: left; padding: 2px 14px 2px 0 !important;
  font-weight: 600; white-space: nowrap}
.mdm-facts td {padding: 2px 0 !important; overflow-wrap: anywhere}
.mdm-words span {display: inline-block; padding: 0 7px; margin: 1px 4px 1px 0;
  border-radius: 9px; background: var(--background-fill-secondary);
  border: 1px solid var(--border-color-primary)}
#preview:not(:has(.mdm-card)), #gallery:not(:has(.mdm-card)) {display: none}
.mdm-card {border-top: 1px solid var(--border-color-primary);
  padding: 12px 0}
.mdm-samples {display: flex; flex-wrap: wrap; gap: 16px; margin-top: 8px}
.mdm-samples figure {margin: 0; max-width: 100%}
.mdm-levels {display: flex; gap: 3px}
.mdm-levels > * {flex: 0 1 auto; min-width: 0; aspect-ratio: 1;
  border-radius: 3px; background: var(--border-color-primary)}
.mdm-levels img {width: 128px; height: auto; margin: 0}
.mdm-few img {width: 192px}
.mdm-levels img.mdm-pixels {image-rendering: pixelated}
#results.mdm-finest .mdm-levels > :not(:last-child) {display: none}
.mdm-samples a {margin-right: 10px; text-decoration: underline}
.mdm-samples code {display: block; user-select: all; white-space: pre-wrap;
  overflow-wrap: anywhere; padding: 8px; border-radius: 4px; width: 0;
  min-width: 100%; background: var(--background-fill-secondary)}
.mdm-card details {margin-top: 6px}
.mdm-card summary {cursor: pointer}
.mdm-button {cursor: pointer; padding: 2px 10px;
  border-radius: 6px; border: 1px solid var(--border-color-primary);
  background: var(--button-secondary-background-fill);
  color: var(--button-secondary-text-color); font-size: var(--text-sm)}
.mdm-controls {display: flex; flex-wrap: wrap; gap: 8px; align-items: center;
  margin: 6px 0}
.mdm-controls input {flex: 1; min-width: 120px; max-width: 420px}
.mdm-levels .mdm-frame {width: 94px; image-rendering: pixelated;
  background-size: 100% auto; background-position: 0 var(--mdm-at, 100%)}
.mdm-pair {display: flex; gap: 12px; max-width: 100%}
.mdm-pair > * {min-width: 0}
"""

# Packs the images of some cards into a ZIP without compression, as PNG files
# are compressed: APPNOTE.TXT of PKWARE, 4.3.7, 4.3.12 and 4.3.16. The images
# are on the page already, so the server is not asked for any.
SCRIPT = """<script>
const mdm = {
  frame(slider) {
    const film = slider.closest('.mdm-film')
    const last = Math.max(1, slider.max)
    film.style.setProperty('--mdm-at', 100 * slider.value / last + '%')
    film.querySelector('output').textContent =
      JSON.parse(film.dataset.labels)[slider.value]
  },
  play(button) {
    const slider = button.parentNode.querySelector('input')
    slider.value = 0
    clearInterval(slider.timer)
    slider.timer = setInterval(() => {
      mdm.frame(slider)
      if (!slider.isConnected || slider.value === slider.max) {
        clearInterval(slider.timer)
      } else slider.value = +slider.value + 1
    }, 150)
  },
  crc(bytes) {
    let crc = -1
    for (const byte of bytes) {
      crc ^= byte
      for (let i = 0; i < 8; i++) crc = crc >>> 1 ^ (crc & 1 ? 0xedb88320 : 0)
    }
    return ~crc >>> 0
  },
  zip(files) {
    const parts = [], index = []
    let offset = 0
    const little = fields => new Uint8Array(
      fields.flatMap(([size, value]) =>
        Array.from({length: size}, (_, i) => value >>> 8 * i & 255)))
    for (const [path, data] of files) {
      const name = new TextEncoder().encode(path)
      const common = [[2, 20], [2, 0x800], [2, 0], [2, 0], [2, 0x21],
        [4, mdm.crc(data)], [4, data.length], [4, data.length],
        [2, name.length], [2, 0]]
      index.push(little([[4, 0x02014b50], [2, 20], ...common,
        [2, 0], [2, 0], [2, 0], [4, 0], [4, offset]]), name)
      const head = little([[4, 0x04034b50], ...common])
      parts.push(head, name, data)
      offset += head.length + name.length + data.length
    }
    const size = index.reduce((sum, part) => sum + part.length, 0)
    return new Blob([...parts, ...index, little([[4, 0x06054b50], [2, 0],
      [2, 0], [2, files.length], [2, files.length], [4, size], [4, offset],
      [2, 0]])], {type: 'application/zip'})
  },
  download(button) {
    const own = button.closest('.mdm-card')
    const cards = own ? [own] : [...document.querySelectorAll('.mdm-card')]
    const files = [], settings = []
    cards.forEach((card, i) => {
      const folder = own ? '' : `request_${cards.length - i}/`
      settings.push({folder, ...JSON.parse(card.dataset.settings)})
      for (const link of card.querySelectorAll('a[download]')) {
        const binary = atob(link.href.split(',')[1])
        files.push([folder + link.download,
          Uint8Array.from(binary, letter => letter.charCodeAt(0))])
      }
    })
    files.push(['settings.json', new TextEncoder().encode(
      JSON.stringify(settings, null, 2))])
    const link = document.createElement('a')
    link.href = URL.createObjectURL(mdm.zip(files))
    link.download = 'mdm_jax_samples.zip'
    link.click()
    setTimeout(() => URL.revokeObjectURL(link.href), 60000)
  },
}
</script>"""
