// A persistent program: the text in upper case.
console.log('{"ready":true}')
require('node:readline').createInterface({ input: process.stdin }).on('line', (line) => {
  const { id, data } = JSON.parse(line)
  console.log(JSON.stringify({ id, result: data.toUpperCase() }))
})
